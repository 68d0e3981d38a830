"""Chat templates: what transformers offers them, and what the sandbox keeps from them."""

import pytest

from lsjax.data.chat import ChatTemplateError, Dialogue, render_chat
from lsjax.data.tokenizer_backends import ByteTokenizer

CHATML = """\
{%- if messages[0].role != 'system' %}
    {{- bos_token + 'default' + eos_token }}
{%- endif %}
{% for message in messages %}
    {%- if message.role == 'tool' %}
        {%- continue %}
    {%- endif %}
<|{{ message.role }}|>
{{ message.content }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}
"""


# Features of the published templates of Qwen 3, SmolLM3, Mistral and OLMo 3.
FEATURES = """\
{%- if enable_thinking is not defined -%}
{%- set enable_thinking = true -%}
{%- endif -%}
{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- if ns.last < 0 and message.role == "user" and not message.content.startswith("<tool>") %}
        {%- set ns.last = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- macro turn(message) -%}
    {{ message["role"] }}:{{ message.content.split("</think>")[-1].lstrip("\\n") }}
{%- endmacro %}
{%- for message in messages %}
    {%- if message.tool_calls is defined or message.get("functions", none) is not none %}
        {{- raise_exception("no tools") }}
    {%- endif %}
    {%- if loop.index0 == ns.last and (tools is not none or xml_tools) %}
        {{- tools | tojson(indent=2) }}
    {%- endif %}
    {% generation %}
    {{- turn(message) ~ "/" ~ loop.index0 }}
    {%- endgeneration %}
    {%- if loop.last %}{{ ns.last }}{{ enable_thinking }}{% break %}{% endif %}
{%- endfor %}
{{ (messages | selectattr("role", "equalto", "user") | list)[-1]["content"] | trim }}
"""


def render(template, messages=(), **options):
    return render_chat(ByteTokenizer(chat_template=template), list(messages), **options)


def test_conversation_is_rendered_with_block_lines_trimmed():
    tokenizer = ByteTokenizer(chat_template=CHATML)
    history = [
        {"role": "user", "content": "one"},
        {"role": "tool", "content": "left out"},
        {"role": "assistant", "content": "two"},
    ]
    dialogue = Dialogue(tokenizer, "be brief")
    dialogue.messages += history
    assert dialogue.prompt("three")[0] == (
        "<|system|>\nbe brief</s>\n<|user|>\none</s>\n<|assistant|>\ntwo</s>\n"
        "<|user|>\nthree</s>\n<|assistant|>\n"
    )
    assert Dialogue(tokenizer).prompt("x")[0].startswith("<s>default</s>")


def test_features_of_published_templates():
    said = [("user", "a"), ("assistant", "<think>\nhm\n</think>\n\nb"), ("user", " c\n")]
    messages = [{"role": role, "content": content} for role, content in said]
    # What transformers 5 renders.
    assert render(FEATURES, messages) == "user:a/0assistant:b/1user: c\n/22Truec"
    refused = [{"role": "user", "content": "a", "tool_calls": []}]
    with pytest.raises(ChatTemplateError, match="no tools"):
        render(FEATURES, refused)


def test_generation_prompt_is_optional():
    messages = [{"role": "user", "content": "x"}]
    assert "assistant" not in render(CHATML, messages, add_generation_prompt=False)


def test_tojson_keeps_html_and_unicode():
    message = {"role": "user", "content": "<b> & 'é'"}
    assert render("{{ messages[0].content | tojson }}", [message]) == "\"<b> & 'é'\""


def test_generation_marks_leave_their_content():
    assert render("a{% generation %}b{{ 1 }}{% endgeneration %}c") == "ab1c"
    kept = "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    assert render(kept) == "21"  # a scope of its own, as in transformers


def test_no_tools_and_documents_are_none():
    assert render("{{ tools is none }} {{ documents is none }}") == "True True"
    assert render("{% if enable_thinking is not defined %}unset{% endif %}") == "unset"


def test_date():
    assert render("{{ strftime_now('%Y') }}").startswith("20")


def test_template_refuses_messages_in_its_own_words():
    with pytest.raises(ChatTemplateError, match="roles must alternate") as error:
        render("{{ raise_exception('roles must\n alternate') }}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/hostname' %}",
        "{{ range(100000000) | list | length }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 1 / 0 }}",
        "{{ undefined.attribute }}",
        "{% if %}",
        "{{ unclosed",
    ],
)
def test_hostile_or_broken_template_is_one_clear_error(template):
    with pytest.raises(ChatTemplateError) as error:
        print(render(template)[:100])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "template",
    ["{{ ''['__class__'] }}", "{{ strftime_now.__globals__ }}", "{{ '{0.__class__}'.format(1) }}"],
)
def test_the_sandbox_shows_nothing_of_pythons_internals(template):
    assert render(template) == ""


def test_syntax_error_names_its_line():
    with pytest.raises(ChatTemplateError, match="line 3"):
        render("a\nb\n{% nonsense %}")


def test_tokenizer_without_template():
    with pytest.raises(ChatTemplateError, match="--prompt without --chat"):
        render_chat(ByteTokenizer(), [])
