"""Chat templates: the text of Transformers, and an end to every one that goes on for ever or fails."""

import threading
import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from qwen2vl_trt.chat_template import ChatTemplate
from qwen2vl_trt.errors import LimitError, PromptError
from tests.support.chat import TEMPLATE

CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": '<é> & "x"', "n": [1, 2.5, None]}}}
CONVERSATIONS = [
    [{"role": "user", "content": " Hi <there>\n"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}, {"type": "video"}]},
        {"role": "assistant", "content": "<think>hm\n</think>\n\nA cat."},
        {"role": "user", "content": ""},
    ],
    [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": '{"seen": "a cat"}', "tool_call_id": "1"},
    ],
]
TEMPLATES = {
    "Qwen2.5-VL": TEMPLATE,
    # Tool calls as Qwen2.5 and Qwen3 write them, reasoning taken out of the history as Qwen3 does.
    "Qwen3": """{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = messages|length - 1 - loop.index0 %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" and not content.startswith('<tool_response>') %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'assistant' and '</think>' in content and loop.index0 < ns.last %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content|trim }}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
        {{- call.function.arguments | tojson }}
        {{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}""",
    "blocks": """
    {% for message in messages %}
    {% if message.role == 'tool' %}
      {% continue %}
    {% endif %}
    {% generation %}
    {% set said = message.content|string %}
    {{ message.role|upper }}: {{ said }}
    {% endgeneration %}
    {% endfor %}
    {{ said }}
""",
    "json": "{{ messages|tojson }}{{ messages|tojson(indent=2, sort_keys=True) }}{{ messages|tojson(true) }}",
    "variables": "{{ eos_token }}{{ bos_token is defined }}{{ tools is none }}{{ documents }}{{ strftime_now('%Y') }}",
    "macros": "{% macro say(m, end='.') %}{{ m.role }} says {{ caller() }}{{ end }}{% endmacro %}"
    "{% for m in messages recursive %}{% call say(m) %}{{ loop.index }}{% endcall %}{% endfor %}"
    "{{ 'ab' * 3 }}{{ 2 ** 10 }}{{ 3 * [1] }}"
    "{{ '%5s %02d%%' % (1, 2) }}{{ 7 % 4 }}{{ 6 * 7.5 }}{{ 2 ** -1 }}{{ range(3)|list }}{{ dict(a=1)|items|list }}",
}


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
def test_the_text_is_that_of_transformers(source, messages):
    variables = {"eos_token": "<|im_end|>"}
    (expected,), _ = render_jinja_template([messages], chat_template=source, add_generation_prompt=True, **variables)
    assert ChatTemplate(source, variables, 100_000, 900).render(messages) == expected


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}" + "{% endfor %}{% endfor %}"
FAILURES = {
    LOOP: "takes over 0.3 s",
    "{% set many = range(99999)|list %}{{ ([many] * 9999)|map('sum')|sum }}": "takes over 0.3 s",
    "{{ lipsum(n=100000) }}": "takes over 0.3 s",
    "{{ 1 / (messages|length - 1) }}": "ZeroDivisionError: division by zero",
    "{{ 'x' + messages|length }}": "TypeError: can only concatenate str",
    "{{ messages[0].role|int(base=99) + 'x' }}": "ValueError|TypeError",
    "{{ messages[5].role }}": "list object has no element 5",
    "{{ nothing.at.all }}": "'nothing' is undefined",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{% set x = messages|length + 9 %}{{ x ** (x ** x) }}": "OverflowError: a number of over 1,000 bits",
    "{% set n = namespace(x=9) %}{% for i in range(90) %}{% set n.x = n.x * n.x %}{% endfor %}": "OverflowError",
    "{% set n = 10**9 %}{{ messages[0].role * n }}": "OverflowError: a text or list repeated",
    "{{ 10**9 * messages }}": "OverflowError: a text or list repeated",
    "{% for i in range(10**6) %}{% endfor %}": "OverflowError: Range too big",
    "{{ '%300000000d' % 1 }}": "OverflowError: a number or text padded",
    "{{ '%(n)-.300000000f' % {'n': 1} }}": "OverflowError: a number or text padded",
    "{{ '%*d' % (10**9, 1) }}": "OverflowError: a number or text padded",
    "{{ messages.append(1) }}": "unsafe",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "unsafe",
    "{% include '/etc/passwd' %}": "no loader",
    "{{ raise_exception('roles must alternate') }}": "^the chat template refuses the messages: roles must alternate$",
    "{{ raise_exception('many\nlines ' ~ 'x' * 100000) }}": "refuses the messages: many lines x{250,300}$",
}


@pytest.mark.parametrize(("source", "message"), FAILURES.items())
def test_whatever_goes_wrong_is_one_error(source, message):
    template = ChatTemplate(source, {}, 100_000, 900)
    template._seconds = 0.3
    began = time.monotonic()
    with pytest.raises(PromptError, match=message):
        template.render([{"role": "user", "content": "hi"}])
    assert time.monotonic() - began < 20


def test_a_text_without_end():
    template = ChatTemplate(LOOP.replace("{% endfor %}", "x" * 1000 + "{% endfor %}", 1), {}, 100_000, 900)
    with pytest.raises(LimitError, match=r"over 100,000 characters, more than 900 tokens .--max-input-len. stand for"):
        template.render([])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for %}", "cannot be compiled"),
        ("{{ 1|no_such_filter }}", "cannot be compiled: No filter named"),
        ("{{ '", "cannot be compiled"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "cannot be compiled: RecursionError"),
        ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "cannot be compiled: SyntaxError"),
        (5, "cannot be compiled"),
    ],
)
def test_what_is_no_template(source, message):
    with pytest.raises(PromptError, match=message):
        ChatTemplate(source, {}, 100_000, 900).render([])


def test_the_thread_of_a_template_without_end_ends_too(capfd):
    template = ChatTemplate(LOOP, {}, 100_000, 900, seconds=0.3)
    with pytest.raises(PromptError, match="takes over"):
        template.render([])
    for thread in threading.enumerate():
        if thread.name == "chat-template":
            thread.join(20)
            assert not thread.is_alive()
    assert capfd.readouterr().err == ""
