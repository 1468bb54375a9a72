"use strict";
// Turns a flow's payload into a message as people write it, which the bridge makes events of. Pure.

const content = require("./content");
const { InputError } = require("./errors");

const FORMATS = ["text", "markdown", "html"];
const KEYS = new Set([...FORMATS, "title", "msgtype", "mentions", "reply_to", "thread", "edit", "key", "on_update", "attachments", "overflow"]);
const EVENT_TYPE = /^\w[\w-]*(\.[\w-]+)+$/; // m.room.message, com.example.alarm
const NOT_BASE64 = /[^A-Za-z0-9+/\s]/; // one that looks for all of it would go back over a long text again and again

/**
 * The message to send: `{message, files}`, or undefined for a payload that is an event's content, or a whole event.
 *
 * `format`: what a text is written in; `refuses`: whether any other object is refused, rather than sent as readable JSON;
 * `options`: the message's other keys, of which the payload's own count more. `files`: [{at, data, label}], the Buffers of
 * the attachments with these indexes, which wait for their content_uri. `msg` names a payload that is a file. Throws InputError.
 */
function read(payload, { format, refuses = false, options = {}, msg = {} }) {
    const given = Object.fromEntries(Object.entries(options).filter(([, value]) => !isAbsent(value)));
    if (given.key === undefined) delete given.on_update;
    const { attachments: more, ...rest } = given;
    const found = isContent(payload) ? undefined : said(payload, format, refuses, more !== undefined, msg);
    if (!found) {
        const [name] = Object.keys(given);
        if (name === undefined) return undefined;
        throw new InputError(`${name} is for a text: the payload is an event's content, which is sent as it is`, `/${name}`);
    }
    const files = [];
    const attachments = [...listed(found.attachments), ...listed(more)].map((each, at) => attachment(each, at, files));
    const message = { ...rest, ...found, attachments };
    if (!attachments.length) delete message.attachments;
    return { message, files };
}

/** The message of a payload alone. */
function said(payload, format, refuses, hasFiles, msg) {
    if (payload === undefined || payload === null || (payload === "" && hasFiles)) {
        if (hasFiles) return {};
        throw new InputError("there is nothing to send: the payload is empty");
    }
    if (isFile(payload)) {
        const data = bytes(payload);
        const { filename, contentType: mimetype } = content.label(data, msg);
        return { attachments: [{ data, filename, mimetype, caption: msg.caption }] };
    }
    if (["string", "number", "boolean", "bigint"].includes(typeof payload)) return { [format]: String(payload) };
    if (isMessage(payload)) return payload;
    if (refuses) {
        throw new InputError(
            "the payload is an object, and neither a message (text, markdown, html, attachments …) nor an event's content: " +
                "make a text of it, or let the node send objects as JSON",
        );
    }
    return readable(payload);
}

/** An object as people can read it; all of it as a file if that is too long. */
function readable(value) {
    let json;
    try {
        json = JSON.stringify(value, null, 2);
    } catch (error) {
        throw new InputError(`the payload cannot be written as JSON: ${String(error && error.message).split("\n")[0]}`);
    }
    if (json === undefined) throw new InputError(`the payload cannot be written as JSON: its type is ${typeof value}`);
    // Nothing in it ends the block: a line of JSON does not begin with a backtick.
    return { markdown: `\`\`\`json\n${json}\n\`\`\``, overflow: "file" };
}

/** An attachment as the bridge takes it; its bytes, if it has any, are put into `files`. */
function attachment(given, at, files) {
    const pointer = `/attachments/${at}`;
    if (typeof given === "string" && /^mxc:/i.test(given)) return { content_uri: given.trim() };
    if (typeof given === "string" && /^https?:/i.test(given)) return { url: given.trim() };
    const item = isFile(given) || isDataUrl(given) ? { data: given } : ofEmail(given);
    if (!isPlain(item)) {
        const kinds = "a Buffer, an address (https://…, mxc://… or data:…), or an object with data, url or content_uri";
        throw new InputError(`attachment ${at + 1} is not a file: give ${kinds}`, pointer);
    }
    const { data: source, ...rest } = item;
    for (const [name, value] of Object.entries(rest)) if (isAbsent(value)) delete rest[name];
    if (isAbsent(source)) return rest;
    for (const name of ["url", "content_uri"]) {
        if (name in rest) throw new InputError(`attachment ${at + 1} has data and ${name}: it is one file`, `${pointer}/${name}`);
    }
    if (isDataUrl(source)) return { ...rest, data: source }; // the bridge reads it, its type, too
    const data = bytes(source);
    if (!data) throw new InputError(`the data of attachment ${at + 1} is neither a Buffer nor base64 nor a data: URL`, `${pointer}/data`);
    const label = content.label(data, { filename: rest.filename, contentType: rest.mimetype });
    files.push({ at, data, label });
    return { ...rest, filename: label.filename, mimetype: label.contentType };
}

/** A file as Node-RED's email node gives it in msg.attachments, with much that is of no use here; others as they are. */
function ofEmail(given) {
    return isPlain(given) && isBytes(given.content) ? { data: given.content, filename: given.filename, mimetype: given.contentType } : given;
}

/** The Buffer of a file, which is not copied; undefined if it is none. */
function bytes(source) {
    if (Buffer.isBuffer(source)) return source;
    if (isBytes(source)) return Buffer.from(source.buffer, source.byteOffset, source.byteLength);
    if (isWrittenBuffer(source)) return Buffer.from(source.data);
    const isBase64 = typeof source === "string" && !NOT_BASE64.test(source.trim().replace(/={1,2}$/, ""));
    return isBase64 ? Buffer.from(source, "base64") : undefined;
}

const isBytes = (value) => value instanceof Uint8Array; // a Buffer is one
const isAbsent = (value) => value === undefined || value === null || value === "" || (Array.isArray(value) && !value.length);
const isPlain = (value) => Boolean(value) && typeof value === "object" && !Array.isArray(value) && !isBytes(value);
/** What JSON makes of a Buffer. */
const isWrittenBuffer = (value) => isPlain(value) && value.type === "Buffer" && Array.isArray(value.data);
const isDataUrl = (value) => typeof value === "string" && /^data:/i.test(value);
const isFile = (value) => isBytes(value) || isWrittenBuffer(value);
const listed = (value) => (value === undefined || value === null ? [] : Array.isArray(value) ? value : [value]);

/** Whether an object is an event's content, or a whole event, for which it needs more than a type: other tools' objects have one, too. */
function isContent(value) {
    if (!isPlain(value) || isMessage(value)) return false;
    return typeof value.msgtype === "string" || (EVENT_TYPE.test(value.type) && isPlain(value.content));
}

/** Whether an object is a message for the bridge: it says something, and all its keys are a message's. */
function isMessage(value) {
    if (!isPlain(value)) return false;
    const names = Object.keys(value);
    return names.every((name) => KEYS.has(name)) && names.some((name) => FORMATS.includes(name) || name === "attachments");
}

module.exports = { FORMATS, read };
