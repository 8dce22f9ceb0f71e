"""``GET /``: one plain page that says what runs here and how to talk to it."""

from __future__ import annotations

import html
import json

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:46rem;margin:3rem auto;padding:0 1rem;color:#222}"
    "pre{background:#f4f4f4;padding:.8rem;overflow-x:auto;font-size:14px}code{font-size:14px}"
    "@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}pre{background:#262626}a{color:#8cf}}"
)


def example_request(base_url: str, model: str, chat: bool, needs_key: bool) -> str:
    """A curl command that a person can paste into a shell."""
    key = " \\\n  -H 'Authorization: Bearer YOUR_KEY'" if needs_key else ""
    if chat:
        path = "/v1/chat/completions"
        body = {"model": model, "messages": [{"role": "user", "content": "Hello! Who are you?"}], "max_tokens": 200}
    else:
        path = "/generate"
        body = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 16}}
    quoted = json.dumps(body).replace("'", "'\\''")
    return f"curl {base_url}{path} -H 'Content-Type: application/json'{key} \\\n  -d '{quoted}'"


def render_page(base_url: str, model: str, status: str, chat: bool, needs_key: bool) -> str:
    """The page's HTML; everything that is not constant is escaped."""
    command = html.escape(example_request(base_url, model, chat, needs_key))
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>nextn</title><style>{_STYLE}</style><h1>nextn</h1>"
        f"<p>An inference server for GLM-4.x MoE models. It serves <code>{html.escape(model)}</code>"
        f" and is <b>{html.escape(status)}</b>.</p>"
        f"<p>It speaks the OpenAI API; point a client at <code>{html.escape(base_url)}/v1</code>, or try:</p>"
        f"<pre>{command}</pre>"
        "<p><a href=/v1/models>models</a> · <a href=/get_server_info>server info</a> · <a href=/metrics>metrics</a>"
        " · <a href=/openapi.json>OpenAPI schema</a></p></html>\n"
    )
