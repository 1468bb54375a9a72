"""The bridge that people write by hand in an afternoon: FastAPI, one stock httpx client, jsonschema."""

import os
from typing import Annotated, Any
from urllib.parse import quote
from uuid import uuid4

import httpx
import jsonschema
from fastapi import Body, FastAPI, Header, HTTPException

SCHEMA = {
    "type": "object",
    "required": ["msgtype", "body"],
    "properties": {
        "msgtype": {"type": "string"},
        "body": {"type": "string"},
        "format": {"const": "org.matrix.custom.html"},
        "formatted_body": {"type": "string"},
    },
    "dependentRequired": {"formatted_body": ["format"], "format": ["formatted_body"]},
}

app = FastAPI()
client = httpx.AsyncClient(base_url=os.environ.get("BASE_URL", ""))
validator = jsonschema.Draft202012Validator(SCHEMA)


@app.post("/rooms/{room_id}/send/{event_type}")
async def send(
    room_id: str,
    event_type: str,
    content: Annotated[dict[str, Any], Body()],
    authorization: Annotated[str, Header()],
) -> dict[str, Any]:
    """Validate the content and forward it as the caller."""
    problems = [problem.message for problem in validator.iter_errors(content)]
    if problems:
        raise HTTPException(400, problems)
    path = f"/_matrix/client/v3/rooms/{quote(room_id, safe='')}/send/{quote(event_type, safe='')}/{uuid4()}"
    answer = await client.put(path, json=content, headers={"Authorization": authorization})
    if answer.is_error:
        raise HTTPException(answer.status_code, answer.json())
    event: dict[str, Any] = answer.json()
    return event
