"""The providers' own clients against the fixture that the tests take for the providers:
if these read it, and it accepts what these send, it speaks their formats."""

import json
import sys

import anthropic
import openai

url, key = sys.argv[1], sys.argv[2]
schema = {"type": "object", "properties": {"path": {"type": "string"}, "content": {}}, "required": ["path"]}

# --- Anthropic ---------------------------------------------------------------
claude = anthropic.Anthropic(api_key=key, base_url=url, max_retries=0)
tools = [{"name": name, "description": "x", "input_schema": schema} for name in ("file_write", "file_read")]


def ask_claude(messages, stream):
    asked = dict(model="claude-sonnet-4-6", max_tokens=100, system="Work.", messages=messages, tools=tools)
    if not stream:
        return claude.messages.create(**asked)
    with claude.messages.stream(**asked) as events:
        return events.get_final_message()


for stream in (False, True):
    messages = [{"role": "user", "content": "go"}]
    turns = 0
    while True:
        said = ask_claude(messages, stream)
        turns += 1
        used = said.usage
        assert (used.input_tokens, used.output_tokens) == (1001, 37), used
        assert (used.cache_read_input_tokens, used.cache_creation_input_tokens) == (11, 7), used
        messages.append({"role": "assistant", "content": said.content})
        calls = [block for block in said.content if block.type == "tool_use"]
        if said.stop_reason != "tool_use":
            break
        assert calls and all(call.input["path"] for call in calls)
        results = [{"type": "tool_result", "tool_use_id": call.id, "content": "ok"} for call in calls]
        messages.append({"role": "user", "content": results})
    assert turns == 3 and json.loads(said.content[0].text) == {"found": "green tea"}, said

try:
    ask_claude([{"role": "user", "content": "go"}, {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "x", "input": {}}]}], False)
    raise SystemExit("the fixture accepts what Anthropic refuses")
except anthropic.BadRequestError:
    pass
try:
    anthropic.Anthropic(api_key="wrong", base_url=url, max_retries=0).messages.create(model="m", max_tokens=1, messages=[])
    raise SystemExit("the fixture accepts a wrong key")
except anthropic.AuthenticationError:
    pass

# --- OpenAI ------------------------------------------------------------------
gpt = openai.OpenAI(api_key=key, base_url=f"{url}/v1", max_retries=0)
functions = [{"type": "function", "function": {"name": tool["name"], "parameters": schema}} for tool in tools]


def ask_gpt(messages, stream):
    asked = dict(model="gpt-4o", messages=messages, tools=functions)
    if not stream:
        return gpt.chat.completions.create(**asked)
    with gpt.chat.completions.stream(**asked, stream_options={"include_usage": True}) as events:
        return events.get_final_completion()


for stream in (False, True):
    messages = [{"role": "system", "content": "Work."}, {"role": "user", "content": "go"}]
    turns = 0
    while True:
        said = ask_gpt(messages, stream)
        turns += 1
        used = said.usage
        assert (used.prompt_tokens, used.completion_tokens) == (1012, 37), used
        assert used.prompt_tokens_details.cached_tokens == 11, used
        choice = said.choices[0]
        if choice.finish_reason != "tool_calls":
            break
        calls = choice.message.tool_calls
        assert calls and all(json.loads(call.function.arguments)["path"] for call in calls)
        asked = [{"id": c.id, "type": "function", "function": {"name": c.function.name, "arguments": c.function.arguments}} for c in calls]
        messages.append({"role": "assistant", "content": choice.message.content, "tool_calls": asked})
        messages += [{"role": "tool", "tool_call_id": call.id, "content": "ok"} for call in calls]
    assert turns == 3 and json.loads(choice.message.content) == {"found": "green tea"}, said

try:
    ask_gpt([{"role": "tool", "tool_call_id": "t", "content": "x"}], False)
    raise SystemExit("the fixture accepts what OpenAI refuses")
except openai.BadRequestError:
    pass

# --- Refusals: the test has told the fixture to answer so next ----------------
try:
    ask_claude([{"role": "user", "content": "go"}], False)
    raise SystemExit("no refusal")
except anthropic.RateLimitError as refused:
    assert refused.response.headers["retry-after"] == "7" and "slow down" in refused.message
try:
    ask_claude([{"role": "user", "content": "go"}], False)
    raise SystemExit("no refusal")
except anthropic.APIStatusError as refused:
    assert refused.status_code == 529
try:
    ask_gpt([{"role": "user", "content": "go"}], False)
    raise SystemExit("no refusal")
except openai.RateLimitError as refused:
    assert refused.code == "insufficient_quota", refused.code
print("the official clients read the fixture")
