import datetime

import pytest

from engine.errors import CheckpointError, InvalidRequestError
from gateway.chat_template import ChatTemplate
from tests.fakes.byte_tokenizer import CHAT_TEMPLATE

USER = [{"role": "user", "content": "hi"}]


def test_messages_and_special_tokens_are_rendered():
    template = ChatTemplate("{{ bos_token }}{{ messages[0]['content'] }}", {"bos_token": "<s>"})
    assert template.render(USER) == "<s>hi"


def test_the_generation_prompt_is_asked_for():
    template = ChatTemplate("{% if add_generation_prompt %}go{% endif %}", {})
    assert template.render(USER) == "go"


def test_raise_exception_reaches_the_caller_with_its_message():
    template = ChatTemplate(CHAT_TEMPLATE, {})
    with pytest.raises(InvalidRequestError, match="tools are not for me"):
        template.render([{"role": "tool", "content": ""}])


@pytest.mark.parametrize("role", ["wizard", "", None, 3, "User"])
def test_unknown_roles_are_refused_by_name(role):
    with pytest.raises(InvalidRequestError, match=r"messages\[1\]\.role is .*must be one of"):
        ChatTemplate(CHAT_TEMPLATE, {}).render([*USER, {"role": role, "content": "x"}])


def test_a_role_that_the_template_names_is_taken():
    source = "{% if messages[0]['role'] == 'ipython' %}py{% endif %}"
    assert ChatTemplate(source, {}).render([{"role": "ipython", "content": ""}]) == "py"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{% set _ = messages.append(1) %}",
        "{{ messages[0].nothing.at.all }}",
        "{{ 1 / 0 }}",
        "{{ messages[0]['content'] + 1 }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_what_the_sandbox_or_python_refuses_is_a_bad_request(source):
    with pytest.raises(InvalidRequestError, match="template"):
        ChatTemplate(source, {}).render(USER)


def test_output_is_bounded():
    template = ChatTemplate("{% for i in range(90000) %}xxxxxxxxxx{% endfor %}", {}, max_chars=1000)
    with pytest.raises(InvalidRequestError, match="more than 1000 characters"):
        template.render(USER)


def test_a_broken_template_is_a_broken_checkpoint():
    with pytest.raises(CheckpointError, match="does not compile"):
        ChatTemplate("{% if %}", {})


def test_tojson_is_plain_json_and_strftime_now_knows_the_year():
    template = ChatTemplate("{{ messages[0] | tojson }}{{ strftime_now('%Y') }}", {})
    year = datetime.datetime.now().astimezone().year
    assert template.render([{"role": "user", "content": "<ä>"}]) == (
        f'{{"role": "user", "content": "<ä>"}}{year}'
    )


def test_block_lines_leave_no_whitespace_behind():
    source = (
        "{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}"
    )
    assert ChatTemplate(source, {}).render(USER) == "hi\n"


def test_loop_controls_are_there():
    source = "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert ChatTemplate(source, {}).render(USER) == "01"
