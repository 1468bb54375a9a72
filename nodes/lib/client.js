"use strict";
// One flowbridge over HTTP. Independent of Node-RED.

const http = require("node:http");
const https = require("node:https");

const MAX_ANSWER_BYTES = 64 * 1024 * 1024;
const MAX_SOCKETS = 32;
const SLOW_BYTES = 100_000; // of an upload, in a second

/** The bridge refused: `status`, `errcode`, `problems` ([{pointer, message, schema}]), `retryAfter` (ms, or undefined). */
class BridgeError extends Error {
    constructor(message, { status, errcode, problems, retryAfter }) {
        super(message);
        this.name = "BridgeError";
        this.status = status;
        this.errcode = errcode;
        this.problems = problems || [];
        this.retryAfter = retryAfter;
    }

    /** Whether the same request may succeed later. */
    get passes() {
        return this.status === 429 || this.status === 408 || (this.status >= 500 && this.status !== 501);
    }
}

/** There is no answer: the bridge is down, or too slow. */
class Unreachable extends Error {
    constructor(message) {
        super(message);
        this.name = "Unreachable";
        this.problems = [];
    }

    get passes() {
        return true;
    }
}

/** The flow's input cannot be used; `problems` says where. */
class InputError extends Error {
    constructor(message, pointer = "") {
        super(message);
        this.name = "InputError";
        this.problems = [{ pointer, message }];
    }
}

class Client {
    /** `timeout`: seconds for a whole call; `tls`: options of Node's https (ca, cert, key, rejectUnauthorized …). */
    constructor({ url, key = "", timeout = 30, tls = {} }) {
        this.base = baseOf(url);
        this.key = key;
        this.timeout = timeout;
        const module = this.base.protocol === "https:" ? https : http;
        this.open = module.request;
        const options = this.base.protocol === "https:" ? tls : {};
        this.agent = new module.Agent({ ...options, keepAlive: true, maxSockets: MAX_SOCKETS });
        this.fresh = new module.Agent({ ...options }); // a connection for each request
    }

    /**
     * One call; resolves to `{status, headers, body}`, the body parsed as JSON. `path` is made with `segments(…)`. `body`: a
     * Buffer, or a value to encode as JSON. `key`: instead of the client's, "" for none. Rejects with BridgeError, Unreachable or InputError.
     */
    async call(method, path, { query, body, headers = {}, key, timeout = this.timeout, signal } = {}) {
        const data = body === undefined || Buffer.isBuffer(body) ? body : written(body);
        const request = { method, path: this.target(path, query), headers: { ...this.headers(key), ...headers } };
        if (data !== undefined) {
            request.headers["content-length"] = data.length;
            request.headers["content-type"] = request.headers["content-type"] || "application/json";
        }
        // If a kept connection breaks, it is unknown whether the bridge saw the request: only repeatable ones use one.
        request.agent = method !== "POST" || headers["idempotency-key"] ? this.agent : this.fresh;
        const ask = () => this.exchange(request, data, timeout, signal);
        const answer = await ask().catch((error) => {
            if (error.stale) return ask();
            throw error;
        });
        const found = parsed(answer.data);
        if (answer.status >= 400) throw refusal(answer, found, this.base);
        if (found === undefined) throw new Unreachable(`${this.base.href} is not a flowbridge: its answer is not JSON`);
        return { status: answer.status, headers: answer.headers, body: found };
    }

    /** Uploads a file to the homeserver, in one piece; resolves to its mxc:// address. */
    async upload(data, { filename = "", contentType = "application/octet-stream", key, signal } = {}) {
        const timeout = this.timeout + data.length / SLOW_BYTES;
        const query = filename ? { filename } : {};
        const headers = { "content-type": contentType };
        const answer = await this.call("POST", "/media", { query, body: data, headers, key, timeout, signal });
        return answer.body.content_uri;
    }

    target(path, query = {}) {
        const given = Object.entries(query).filter(([, value]) => value !== undefined && value !== "");
        const text = new URLSearchParams(given).toString();
        return this.base.pathname.replace(/\/$/, "") + path + (text && `?${text}`);
    }

    headers(key = this.key) {
        const headers = { accept: "application/json", "user-agent": "flowbridge-node-red" };
        if (key) headers.authorization = `Bearer ${key}`;
        return headers;
    }

    /** The request options of Node's http for this bridge. */
    options(request) {
        return { host: this.base.hostname.replace(/^\[|\]$/g, ""), port: this.base.port, ...request };
    }

    exchange(request, data, timeout, signal) {
        return new Promise((resolve, reject) => {
            const ends = (error) => {
                clearTimeout(timer);
                if (signal) signal.removeEventListener("abort", stop);
                if (error) reject(error);
            };
            const away = (why) => ends(new Unreachable(`${why}: ${this.base.href}`));
            let call;
            const stop = () => {
                ends(new Unreachable("stopped"));
                if (call) call.destroy();
            };
            const timer = setTimeout(() => {
                away(`no answer within ${timeout} s`);
                call.destroy();
            }, timeout * 1000);
            if (signal && signal.aborted) return stop();
            if (signal) signal.addEventListener("abort", stop);
            try {
                call = this.open(this.options(request), (answer) => {
                    const pieces = [];
                    let size = 0;
                    answer.on("data", (piece) => {
                        pieces.push(piece);
                        size += piece.length;
                        if (size > MAX_ANSWER_BYTES) call.destroy(new Error("an answer of more than 64 MiB"));
                    });
                    answer.on("error", (error) => away(reason(error)));
                    answer.on("end", () => {
                        ends();
                        resolve({ status: answer.statusCode, headers: answer.headers, data: Buffer.concat(pieces) });
                    });
                });
            } catch (error) {
                // Node refuses characters that are not allowed in a header or a path.
                return ends(new InputError(`the request cannot be made: ${error.message}`));
            }
            call.on("error", (error) => {
                const failure = new Unreachable(`${reason(error)}: ${this.base.href}`);
                // A kept connection may have been closed at the same moment.
                failure.stale = call.reusedSocket && error.code === "ECONNRESET";
                ends(failure);
            });
            call.end(data);
        });
    }

    /** Closes idle connections; those in use close after their call. Further calls are possible. */
    close() {
        this.agent.maxFreeSockets = 0;
        for (const socket of Object.values(this.agent.freeSockets).flat()) socket.destroy();
    }
}

/** A path of these segments, each encoded. */
function segments(...parts) {
    try {
        return parts.map((part) => `/${encodeURIComponent(part)}`).join("");
    } catch {
        throw new InputError("a name contains half a character (a lone surrogate)");
    }
}

function baseOf(url) {
    let base;
    try {
        base = new URL(url);
    } catch {
        throw new InputError(`${JSON.stringify(String(url))} is not a URL, such as http://localhost:8090`);
    }
    if (!["http:", "https:"].includes(base.protocol)) throw new InputError(`${base.protocol}// is not http:// or https://`);
    if (base.username || base.search) throw new InputError("the URL contains a user or a query: put the key into its own field");
    base.port = base.port || (base.protocol === "https:" ? 443 : 80);
    return base;
}

/** A value as JSON, in bytes. */
function written(value) {
    let text;
    try {
        text = JSON.stringify(value);
    } catch (error) {
        throw new InputError(`the payload cannot be written as JSON: ${String(error && error.message).split("\n")[0]}`);
    }
    if (text === undefined) throw new InputError(`the payload cannot be written as JSON: its type is ${typeof value}`);
    return Buffer.from(text);
}

function parsed(data) {
    try {
        return JSON.parse(data.toString());
    } catch {
        return undefined;
    }
}

function refusal({ status, headers }, found, base) {
    if (!found || typeof found.errcode !== "string") {
        return new BridgeError(`${base.href} answers ${status}, and is not a flowbridge`, { status });
    }
    const pause = found.retry_after_ms ?? Number(headers["retry-after"]) * 1000;
    return new BridgeError(found.error || found.errcode, {
        status,
        errcode: found.errcode,
        problems: found.flowbridge && found.flowbridge.problems,
        retryAfter: Number.isFinite(pause) ? pause : undefined,
    });
}

function reason(error) {
    if (error.code === "ECONNREFUSED") return "connection refused";
    if (error.code === "ENOTFOUND" || error.code === "EAI_AGAIN") return "no such host";
    if (error.errors && error.errors.length) return reason(error.errors[0]);
    return error.message || error.code || "the connection broke";
}

module.exports = { Client, BridgeError, Unreachable, InputError, segments, written, reason };
