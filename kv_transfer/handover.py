"""One sequence's KV on its way from a prefill worker into reserved blocks of a decode worker."""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.errors import KvCorruptionError, KvLeaseLostError, PeerUnavailableError
from engine.scheduling.data_shard import pool_blocks
from kv_transfer.group_layout import GroupLayout
from kv_transfer.peer import Peer
from kv_transfer.plane import WritePermit
from kv_transfer.report import HandoverReport
from kv_transfer.reshard import num_handover_bytes
from kv_transfer.sending_rank import RankLink, Written
from kv_transfer.session import Session, outcome_of
from kv_transfer.slot_ranges import SlotRange, SlotRanges, slot_ranges
from kv_transfer.states import HANDOVERS, HandoverEvent, HandoverState
from kv_transfer.together import together
from protos.isthmus.v1 import kv_transfer_pb2 as pb

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TokenShard:
    """Tokens [first_token, end_token), held by the ranks of one token shard."""

    first_token: int
    end_token: int
    token_shard: int


class Handover:
    """Push in order, then commit; or close early, which gives the blocks back. Loop only."""

    def __init__(
        self,
        request_id: str,
        peer: Peer,
        session: Session,
        permit: WritePermit,
        *,
        block_ids: Sequence[int],
        num_cached_tokens: int,
        num_tokens: int,
        layout: GroupLayout,
        num_blocks: int,
        report: HandoverReport,
        rpc_timeout_s: float,
    ) -> None:
        self.request_id = request_id
        self.peer = peer
        self.session = session
        self.report = report
        self.num_cached_tokens = num_cached_tokens
        self._permit = permit
        self.block_ids = tuple(block_ids)
        self._num_tokens = num_tokens
        self._layout = layout
        self._num_blocks = num_blocks
        self._receiver_shard, self._remote_blocks = pool_blocks(
            self.block_ids, session.offer.num_blocks
        )
        self._rpc_timeout_s = rpc_timeout_s
        self._end_token = num_cached_tokens
        self._writes: set[asyncio.Future[Written]] = set()
        self._failure: BaseException | None = None
        self._state = HandoverState.OPEN
        session.permits[permit.lease_id] = permit

    @property
    def receiver_id(self) -> str:
        """The worker that answers at the address."""
        return self.session.offer.receiver_id

    @property
    def is_late(self) -> bool:
        """Less than half of the lease is left."""
        permit = self._permit
        return permit.clock() > permit.deadline_s - self.session.lease_s / 2

    async def push(
        self,
        local_block_ids: Sequence[int],
        first_token: int,
        num_tokens: int,
        *,
        shards: Sequence[TokenShard] = (),
        step: int | None = None,
    ) -> None:
        """Write the KV of tokens [first_token, first_token + num_tokens); returns when it is there.

        After a push that fails, all that is left is to close.

        What the receiver has already (its cached prefix, earlier pushes) is skipped. The local
        blocks must not change before this returns, or, if it is cancelled, before `close` does.

        Args:
            local_block_ids: all blocks of the sequence so far, in order.
            first_token: at most where the last push ended.
            num_tokens: tokens that these blocks hold from there on.
            shards: which ranks hold which of these tokens, where they are split (sp): in order,
                without gaps.
            step: of this worker's engine, which computes the last of these tokens: each rank sends
                each layer as soon as it has it. None when every rank has computed its part.

        Raises:
            RankDeadError: a rank of this worker is gone; the text names it.
            KvLeaseLostError: the receiver took the blocks back, or the lease ended.
            PeerUnavailableError, KvCorruptionError: the bytes did not arrive.
        """
        if self._failure is not None:
            raise self._failure
        first, end = self._end_token, first_token + num_tokens
        if end <= first:
            return
        if first_token > first or end > self._num_tokens:
            raise ValueError(
                f"push of tokens [{first_token}, {end}) where [{first}, {self._num_tokens}) is left"
            )
        data_shard, local_blocks = pool_blocks(local_block_ids, self._num_blocks)
        parts_of_shard: dict[int, list[SlotRanges]] = {}
        for shard in self._cut_shards(shards, first_token, end):
            if shard.end_token > first:
                parts_of_shard.setdefault(shard.token_shard, []).append(
                    slot_ranges(
                        local_blocks,
                        self._remote_blocks,
                        local_size_tokens=self._layout.block_size_tokens,
                        remote_size_tokens=self.session.offer.layout.block_size_tokens,
                        first_token=max(first, shard.first_token),
                        end_token=shard.end_token,
                    )
                )
        self._end_token = end
        try:
            ranges = {shard: SlotRanges.joined(parts) for shard, parts in parts_of_shard.items()}
            num_bytes = await self._write(ranges, data_shard, step)
        except Exception as error:
            self._failure = self._failure or error
            self._move(HandoverEvent.WRITE_FAILED)
            raise
        if num_bytes != num_handover_bytes(self.session.offer.layout, end - first):
            raise AssertionError(f"wrote {num_bytes} bytes for {end - first} tokens")
        self.report.num_bytes += num_bytes
        self.report.num_tokens += end - first

    async def commit(self, first_token_id: int) -> None:
        """Tell the receiver that all is there; the sequence decodes there from now on.

        Raises:
            KvLeaseLostError: the receiver took the blocks back before.
            PeerUnavailableError, DeadlineError: it did not answer, so it may have them or not.
        """
        if self._failure is not None:
            raise self._failure
        if self._end_token != self._num_tokens:
            raise ValueError(f"commit at token {self._end_token} of {self._num_tokens}")
        if self._writes:
            raise ValueError("commit while a push is under way")
        self._move(HandoverEvent.COMMIT_ASKED)
        self.report.commit_start_ns = time.time_ns()
        request = pb.CommitRequest(
            epoch=self.session.offer.epoch,
            lease_id=self._permit.lease_id,
            num_bytes=self.report.num_bytes,
            first_token_id=first_token_id,
        )
        try:
            await self._call_commit(request)
        except BaseException:
            self._move(HandoverEvent.COMMIT_FAILED)
            raise
        self._move(HandoverEvent.COMMIT_ANSWERED)
        self.report.commit_end_ns = time.time_ns()
        self.report.outcome = "committed"
        if not self.report.num_tokens:
            self.report.data_plane = "none"

    async def close(self) -> None:
        """End the handover. Uncommitted: stop writing, then give the blocks back, acknowledged.

        Not to be cancelled: `KvSender` sees to that.
        """
        self._move(HandoverEvent.CLOSE_ASKED)
        self._permit.stop()
        if self._state is HandoverState.STOPPING:
            if self._writes:
                await asyncio.wait(self._writes)
            self._move(HandoverEvent.WRITES_ENDED)
        self.session.permits.pop(self._permit.lease_id, None)
        if self._state is HandoverState.RELEASING:
            await self.peer.release(self.session.offer.epoch, self._permit.lease_id)
            self._move(HandoverEvent.RELEASE_ENDED)
        self.session.leave()

    def fail(self, error: BaseException) -> None:
        """Note why the handover ends without a commit."""
        if self.report.outcome != "committed":
            self.report.outcome = outcome_of(error)

    def _cut_shards(
        self, shards: Sequence[TokenShard], first_token: int, end_token: int
    ) -> Sequence[TokenShard]:
        """`shards`, sure to be what was pushed and known to the layout."""
        num_shards = self._layout.num_token_shards
        if not shards and num_shards == 1:
            return (TokenShard(first_token, end_token, 0),)
        borders = [shard.first_token for shard in shards] + [end_token]
        is_sound = (
            borders[0] == first_token
            and [shard.end_token for shard in shards] == borders[1:]
            and all(shard.first_token < shard.end_token for shard in shards)
            and all(0 <= shard.token_shard < num_shards for shard in shards)
        )
        if not is_sound:
            raise ValueError(
                f"tokens [{first_token}, {end_token}) of {num_shards} shards as {list(shards)}"
            )
        return shards

    async def _write(
        self,
        parts_of_shard: Mapping[int, Sequence[SlotRange]],
        data_shard: int,
        step: int | None,
    ) -> int:
        report = self.report
        start_ns = report.computed_ns = time.time_ns()
        report.transfer_start_ns = report.transfer_start_ns or start_ns
        work = self.session.work_for(
            parts_of_shard, data_shard=data_shard, receiver_shard=self._receiver_shard
        )
        written = await together([self._write_to(link, parts, step) for link, parts in work])
        report.transfer_end_ns = time.time_ns()
        report.write_ns += max((each.write_ns for each in written), default=0)
        return sum(each.num_bytes for each in written)

    async def _write_to(
        self, link: RankLink, parts: Sequence[SlotRange], step: int | None
    ) -> Written:
        """Once more when the bytes came to harm on their way; the lease ends it all the same."""
        try:
            return await self._write_once(link, parts, step)
        except (KvCorruptionError, PeerUnavailableError) as error:
            reason = "corrupt" if isinstance(error, KvCorruptionError) else "broken"
            logger.warning("writing again request_id=%s: %s", self.request_id, error)
            self.report.retransfers.append(reason)
            return await self._write_once(link, parts, step)

    async def _write_once(
        self, link: RankLink, parts: Sequence[SlotRange], step: int | None
    ) -> Written:
        write = link.write(self._permit, parts, step)
        if not write.done():
            self._writes.add(write)
            write.add_done_callback(self._end_write)
            await asyncio.wait([write])  # does not cancel it; `close` waits for the rest
        return write.result()

    def _end_write(self, write: asyncio.Future[Written]) -> None:
        self._writes.discard(write)
        if not write.cancelled():
            write.exception()  # its push may have been cancelled, so that nobody looks at it

    def _move(self, event: HandoverEvent) -> None:
        name = f"handover of request {self.request_id}"
        self._state = HANDOVERS.after(self._state, event, name)

    async def _call_commit(self, request: pb.CommitRequest) -> None:
        try:
            await self.peer.call(self.peer.calls.Commit, request, self._rpc_timeout_s)
        except PeerUnavailableError:
            # The connection may have broken on the way back. Asking again is harmless.
            await self.peer.call(self.peer.calls.Commit, request, self._rpc_timeout_s)
        except KvLeaseLostError:
            self.peer.forget(self.session)
            raise
