"""The OpenAPI operation of flowbridge.web.routes.discovery."""

from flowbridge.web.describe import as_json, operation

WELL_KNOWN = operation(
    "well_known",
    "Matrix surface",
    "Where Matrix clients find their homeserver",
    description="The bridge's own address: `FLOWBRIDGE_PUBLIC_URL`, or as the request names it.",
    ok="What the specification's server discovery says.",
    answers=as_json(
        {
            "type": "object",
            "required": ["m.homeserver"],
            "properties": {
                "m.homeserver": {
                    "type": "object",
                    "required": ["base_url"],
                    "properties": {"base_url": {"type": "string", "format": "uri"}},
                }
            },
        }
    ),
    errors=(400,),
    open_to_all=True,
)
