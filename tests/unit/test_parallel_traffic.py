from engine.parallel import Traffic, TrafficReport


def test_traffic_is_counted_until_it_is_taken() -> None:
    traffic = Traffic()
    traffic.add(0.5, 100)
    traffic.add(0.25, 20)
    assert traffic.take() == TrafficReport(seconds=0.75, num_bytes=120, num_calls=2)
    assert traffic.take() == TrafficReport()
