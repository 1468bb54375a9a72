"""The OpenAPI operations of uploads and downloads, in words."""

from flowbridge.web.describe import UPSTREAM, Operation, as_json, operation, parameter, query

_BYTES: Operation = {"schema": {"type": "string", "format": "binary"}}
_BASE64: Operation = {
    "type": "object",
    "required": ["data"],
    "additionalProperties": False,
    "properties": {
        "data": {"type": "string", "description": "Base64 (either alphabet), or a `data:` URL."},
        "filename": {"type": "string"},
        "content_type": {"type": "string", "description": "May also be written `contentType`."},
        "contentType": {"type": "string"},
    },
}
_BUFFER: Operation = {
    "type": "object",
    "description": "A Node-RED Buffer.",
    "required": ["type", "data"],
    "additionalProperties": False,
    "properties": {
        "type": {"const": "Buffer"},
        "data": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}},
    },
}
_DATA_URL: Operation = {"type": "string", "pattern": "^data:"}
_FLOW_MESSAGE: Operation = {
    "type": "object",
    "description": "A message of a flow tool; its other properties are ignored.",
    "required": ["payload"],
    "properties": {
        "payload": {"anyOf": [_BUFFER, _BASE64, _DATA_URL]},
        "filename": {"type": "string"},
        "contentType": {"type": "string", "description": "May also be written `content_type`."},
    },
}
_FORM: Operation = {
    "type": "object",
    "required": ["file"],
    "properties": {"file": {"type": "string", "format": "binary"}},
}
_MEDIA_ID = "ascERGshawAWawugaAcauga"
_HELLO = "aGVsbG8="
_OLD = (
    "With a token, the file comes from the homeserver's authenticated endpoints. Without one, only files from before "
    "the homeserver made its media private are served."
)

_PATH = [
    parameter("serverName", "The server of an `mxc://server/mediaId` address.", "localhost"),
    parameter("mediaId", "The media id of an `mxc://server/mediaId` address.", _MEDIA_ID, maxLength=255),
]
_FILENAME = parameter("filename", "The name to save it under.", "cat.png", maxLength=255)
_TIMEOUT = query(
    "timeout_ms", "How long to wait for a file that is not uploaded yet.", 20000, type="integer", minimum=0
)
_REMOTE = [
    query(name, f"Whether {what}.", "true", enum=["true", "false"])
    for name, what in (
        ("allow_remote", "the homeserver may fetch it from another server"),
        ("allow_redirect", "it may redirect to the file"),
    )
]
_SIZES = [query(name, "In pixels.", 64, type="integer", minimum=1, maximum=99_999) for name in ("width", "height")]
_METHOD = query("method", "Scale or crop the picture to this size.", "scale", enum=["scale", "crop"])
_ANIMATED = query("animated", "Whether the picture may be animated.", "false", enum=["true", "false"])

UPLOAD = operation(
    "upload",
    "Flow surface",
    "Upload a file",
    description="The body is the file, and its Content-Type the file's type; or a form (`multipart/form-data`), whose "
    "first part with a filename is the file; or JSON that contains the file. A body is read as JSON when it has "
    "exactly one of the shapes below, and its Content-Type is JSON, curl's default "
    "(`application/x-www-form-urlencoded`) or missing; otherwise it is the file itself. To upload a JSON file that "
    "looks like one of the shapes, send it as a form. Without a type, or with curl's default, the type is guessed from "
    "the filename. A body with one of these types that begins like JSON may be 32 MiB long; for any other file the "
    "homeserver's limit counts.",
    ok="The file is uploaded.",
    answers=as_json(
        {
            "type": "object",
            "required": ["content_uri"],
            "properties": {"content_uri": {"type": "string", "examples": [f"mxc://localhost/{_MEDIA_ID}"]}},
        }
    ),
    errors=(400, 408, 413, 415, *UPSTREAM),
    parameters=[query("filename", "The file's name. Overrides one in the body.", "cat.png", maxLength=255)],
    body={
        "required": True,
        "content": {
            "application/octet-stream": _BYTES,
            "multipart/form-data": {"schema": _FORM},
            "application/json": {
                "schema": {"anyOf": [_BASE64, _BUFFER, _DATA_URL, _FLOW_MESSAGE]},
                "examples": {
                    "base64": {"value": {"data": _HELLO, "filename": "hello.txt"}},
                    "data URL": {"value": {"data": f"data:text/plain;base64,{_HELLO}"}},
                    "Buffer": {"value": {"type": "Buffer", "data": [104, 105]}},
                    "flow message": {
                        "value": {
                            "payload": {"type": "Buffer", "data": [104, 105]},
                            "filename": "hi.txt",
                            "contentType": "text/plain",
                            "_msgid": "f1",
                        }
                    },
                },
            },
        },
    },
)


def download(path: str) -> Operation:
    """The operation of one of the routes that serve a file, or its thumbnail."""
    old = path.startswith("/_matrix/")
    is_thumbnail = "thumbnail" in path
    name = "Filename" if "{filename}" in path else ""
    id_ = f"{'matrix' if old else 'flow'}_{'thumbnail' if is_thumbnail else 'download'}{name}"
    own = [*_SIZES, _METHOD, _ANIMATED] if is_thumbnail else [_FILENAME] if name else []
    return operation(
        id_,
        "Matrix surface" if old else "Flow surface",
        "Download a thumbnail" if is_thumbnail else "Download a file",
        description=_OLD if old else "",
        ok="The file, streamed, with headers that keep a browser from running it.",
        answers={"*/*": _BYTES},
        errors=(400, *UPSTREAM),
        parameters=[*_PATH, *own, *_REMOTE, _TIMEOUT],
        open_to_all=old,
    )
