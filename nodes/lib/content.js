"use strict";
// Turns a flow's payload into an event's content, or a file. Pure.

const { InputError } = require("./errors");

const MESSAGE = "m.room.message";
const UNKNOWN = "application/octet-stream";

const TYPES = {
    aac: "audio/aac", bmp: "image/bmp", csv: "text/csv", flac: "audio/flac", gif: "image/gif", html: "text/html",
    jpg: "image/jpeg", jpeg: "image/jpeg", json: "application/json", m4a: "audio/mp4", md: "text/markdown",
    mov: "video/quicktime", mp3: "audio/mpeg", mp4: "video/mp4", ogg: "audio/ogg", oga: "audio/ogg", ogv: "video/ogg",
    opus: "audio/ogg", pdf: "application/pdf", png: "image/png", svg: "image/svg+xml", txt: "text/plain",
    wav: "audio/wav", webm: "video/webm", webp: "image/webp", xml: "application/xml", zip: "application/zip",
};
// A type is written with its first extension.
const EXTENSIONS = Object.fromEntries(Object.entries(TYPES).reverse().map(([extension, type]) => [type, extension]));

// The first bytes of files; null stands for any byte.
const MAGIC = [
    ["image/png", [0x89, 0x50, 0x4e, 0x47]],
    ["image/jpeg", [0xff, 0xd8, 0xff]],
    ["image/gif", [0x47, 0x49, 0x46, 0x38]],
    ["image/webp", [0x52, 0x49, 0x46, 0x46, null, null, null, null, 0x57, 0x45, 0x42, 0x50]],
    ["audio/wav", [0x52, 0x49, 0x46, 0x46, null, null, null, null, 0x57, 0x41, 0x56, 0x45]],
    ["audio/mpeg", [0x49, 0x44, 0x33]],
    ["audio/flac", [0x66, 0x4c, 0x61, 0x43]],
    ["audio/ogg", [0x4f, 0x67, 0x67, 0x53]],
    ["video/mp4", [null, null, null, null, 0x66, 0x74, 0x79, 0x70]],
    ["video/webm", [0x1a, 0x45, 0xdf, 0xa3]],
    ["application/pdf", [0x25, 0x50, 0x44, 0x46]],
    ["application/zip", [0x50, 0x4b, 0x03, 0x04]],
];

/**
 * What to send: `{type, content}` with JSON for the bridge, or `{type, file}` with a Buffer.
 *
 * A string, a number or a boolean is a text; an object is the content, or a whole event (`{type, content}`), whose type
 * wins; a Buffer is a file. Throws InputError.
 */
function read(payload, type) {
    if (payload === undefined || payload === null) throw new InputError("there is nothing to send: the payload is empty");
    if (Buffer.isBuffer(payload) || payload instanceof Uint8Array) {
        if (type !== MESSAGE) throw new InputError(`a Buffer is sent as a file, which is a ${MESSAGE}, not a ${type}`);
        return { type, file: Buffer.isBuffer(payload) ? payload : Buffer.from(payload) };
    }
    if (["string", "number", "boolean", "bigint"].includes(typeof payload)) {
        if (type !== MESSAGE) throw new InputError(`a ${typeof payload} is a payload for ${MESSAGE} only: ${type} takes an object`);
        return { type, content: { msgtype: "m.text", body: String(payload) } };
    }
    if (typeof payload !== "object" || Array.isArray(payload)) {
        const kind = Array.isArray(payload) ? "an array" : `a ${typeof payload}`;
        throw new InputError(`a payload is a string, an object or a Buffer, not ${kind}`);
    }
    const isEvent = typeof payload.type === "string" && payload.content && typeof payload.content === "object";
    return { type: isEvent && payload.type ? payload.type : type, content: payload };
}

/** A file's name and media type: from the message, else by its name, else by its first bytes. */
function label(data, msg) {
    const headers = (msg && typeof msg.headers === "object" && msg.headers) || {};
    const said = text(msg.contentType) || text(headers["content-type"]);
    const name = nameOf(text(msg.filename) || text(headers["x-filename"]));
    const byName = TYPES[name.split(".").pop().toLowerCase()];
    const contentType = (said.split(";")[0].trim().toLowerCase() || byName || sniffed(data)).replace(/[^\x21-\x7e]/g, "");
    return { filename: name || `file.${EXTENSIONS[contentType] || "bin"}`, contentType: contentType || UNKNOWN };
}

/** The content of a message that shows an uploaded file. `info`: what the bridge knows of it. */
function fileMessage({ content_uri: url, info }, size, { filename, contentType }) {
    const kind = contentType.split("/")[0];
    const msgtype = ["image", "audio", "video"].includes(kind) ? `m.${kind}` : "m.file";
    return { msgtype, body: filename, filename, url, info: { mimetype: contentType, size, ...info } };
}

function nameOf(path) {
    return path.split(/[/\\]/).pop().trim();
}

function sniffed(data) {
    const fits = ([, bytes]) => bytes.every((byte, at) => byte === null || data[at] === byte);
    const found = MAGIC.find(fits);
    return found ? found[0] : UNKNOWN;
}

function text(value) {
    return typeof value === "string" ? value : "";
}

module.exports = { MESSAGE, read, label, fileMessage };
