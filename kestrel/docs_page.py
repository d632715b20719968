"""The OpenAPI document as a page for people."""

from __future__ import annotations

import html
import json
from typing import Any

Schema = dict[str, Any]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem }
tr { border-bottom: 1px solid #8886 }
code, pre { font: 14px/1.4 ui-monospace, monospace }
pre { background: #8881; padding: .8rem; overflow: auto }
"""


def docs_page(document: Schema) -> str:
    """The document as one HTML page that loads nothing."""
    parts = [f"<h1>{html.escape(document['info']['title'])}</h1>"]
    parts.append(f"<p>{html.escape(document['info']['description'])} ")
    parts.append('The same as <a href="openapi.json">OpenAPI 3.1</a>.</p>')
    root = document["servers"][0]["url"].rstrip("/")
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(root + path)}</code></h2>")
            parts.append(f"<p>{html.escape(operation['summary'])}.</p>")
            parts.append(_table(_operation_rows(operation)))
    parts.append("<h1>Types</h1>")
    for name, schema in document["components"]["schemas"].items():
        parts.append(f"<h2>{html.escape(name)}</h2>")
        text = json.dumps(schema, indent=2, ensure_ascii=False)
        parts.append(f"<pre>{html.escape(text)}</pre>")
    body = "\n".join(parts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(document['info']['title'])}</title><style>{_STYLE}</style></head>"
        f"<body>{body}</body></html>"
    )


def _operation_rows(operation: Schema) -> list[tuple[str, str]]:
    rows = [(p["name"], p["description"]) for p in operation.get("parameters", ())]
    content = operation.get("requestBody", {}).get("content", {})
    rows += [("body", f"{kind}: {_type_name(media)}") for kind, media in content.items()]
    for status, response in operation["responses"].items():
        types = ", ".join(_type_name(media) for media in response["content"].values())
        headers = ", ".join(response["headers"])
        rows.append((status, f"{response['description']} ({types}; headers {headers})"))
    return rows


def _type_name(media: Schema) -> str:
    return str(media["schema"]["$ref"]).rsplit("/", 1)[-1]


def _table(rows: list[tuple[str, str]]) -> str:
    cells = (f"<tr><th>{html.escape(a)}</th><td>{html.escape(b)}</td></tr>" for a, b in rows)
    return f"<table>{''.join(cells)}</table>"
