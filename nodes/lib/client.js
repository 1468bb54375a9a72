"use strict";
// One flowbridge over HTTP. Independent of Node-RED.

const http = require("node:http");
const https = require("node:https");

const { baseOf, isUntrusted, isWrongProtocol } = require("./address");
const { BridgeError, InputError, Unreachable } = require("./errors");
const { english } = require("./words");

const MAX_ANSWER_BYTES = 64 * 1024 * 1024;
const MAX_SOCKETS = 32;
const SLOW_BYTES = 100_000; // of a body, in a second
const LOOK_SECONDS = 5; // to find out what is at an address that is no bridge's
const LOOK_AGAIN = 30_000; // ms

class Client {
    /**
     * `timeout`: seconds for a whole call, beside what its body takes; `tls`: options of Node's https (ca, cert, key, rejectUnauthorized …); `words`:
     * the sentences about addresses, by a kind and its values, as lib/words.js has them in English.
     */
    constructor({ url, key = "", timeout = 30, tls = {}, words = english("flowbridge-server", "address") }) {
        this.words = words;
        this.base = baseOf(url, words);
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
        const seconds = timeout + (data ? data.length / SLOW_BYTES : 0);
        const ask = () => this.exchange(request, data, seconds, signal);
        const answer = await ask().catch((error) => {
            if (error.stale) return ask();
            throw error;
        });
        const found = parsed(answer.data);
        if (answer.status >= 400 || found === undefined) throw await this.refusal(answer.status, answer.headers, found);
        return { status: answer.status, headers: answer.headers, body: found };
    }

    /** Uploads a file to the homeserver, in one piece; resolves to its address (`content_uri`) and what is known of it (`info`). */
    async upload(data, { filename = "", contentType = "application/octet-stream", key, signal } = {}) {
        const query = filename ? { filename } : {};
        const headers = { "content-type": contentType };
        const answer = await this.call("POST", "/media", { query, body: data, headers, key, signal });
        return answer.body;
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

    exchange(request, data, timeout, signal, open = this.open) {
        return new Promise((resolve, reject) => {
            const ends = (error) => {
                clearTimeout(timer);
                if (signal) signal.removeEventListener("abort", stop);
                if (error) reject(error);
            };
            const away = (why) => ends(new Unreachable(`${why}: ${this.base.href}`));
            const fails = (error) => ends(this.unreachable(error));
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
                call = open(this.options(request), (answer) => {
                    const pieces = [];
                    let size = 0;
                    answer.on("data", (piece) => {
                        pieces.push(piece);
                        size += piece.length;
                        if (size > MAX_ANSWER_BYTES) call.destroy(new Error("an answer of more than 64 MiB"));
                    });
                    answer.on("error", fails);
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
                const failure = this.unreachable(error);
                // A kept connection may have been closed at the same moment.
                failure.stale = call.reusedSocket && error.code === "ECONNRESET";
                ends(failure);
            });
            call.end(data);
        });
    }

    /** Why there is no answer. */
    unreachable(error) {
        const address = this.base.origin;
        if (isWrongProtocol(error)) return this.mistaken(Unreachable, "speaksHttp", { address, better: address.replace("https", "http") });
        if (isUntrusted(error)) return this.mistaken(Unreachable, "certificate", { address, reason: error.message });
        return new Unreachable(`${reason(error)}: ${this.base.href}`);
    }

    /** What an answer means that refuses the call, or that is not a bridge's: `found` is its body, if that is JSON. */
    async refusal(status, headers, found) {
        const { error, errcode, flowbridge, retry_after_ms: retry } = found || {};
        const isMatrix = typeof errcode === "string";
        const isLost = errcode === "M_UNRECOGNIZED" || (status === 404 && this.base.pathname !== "/");
        const isElsewhere = status < 500 && (!isMatrix || isLost);
        const mistake = isElsewhere && (await this.mistake());
        if (mistake) return this.mistaken(BridgeError, ...mistake, { status, errcode });
        if (!isMatrix) {
            const kind = status < 400 ? Unreachable : BridgeError; // a page in between may be gone later
            return this.mistaken(kind, "notABridge", { address: this.base.href, status }, { status });
        }
        const pause = retry ?? Number(headers["retry-after"]) * 1000;
        return new BridgeError(error || errcode, {
            status,
            errcode,
            problems: flowbridge && flowbridge.problems,
            retryAfter: Number.isFinite(pause) ? pause : undefined,
        });
    }

    /** What is at our address instead of a bridge, as `[kind, values]`; nothing if it is one, or that cannot be told. */
    mistake() {
        if (!this.looking || Date.now() > this.lookAgain) {
            this.lookAgain = Date.now() + LOOK_AGAIN;
            this.looking = this.lookAround();
        }
        return this.looking;
    }

    async lookAround() {
        const isBridge = async (path, how) => typeof (await this.look(path, how)).version === "string";
        const { href: address, origin: better } = this.base;
        if (await isBridge(this.target("/healthz"))) return undefined;
        const { versions } = await this.look(this.target("/_matrix/client/versions"));
        if (Array.isArray(versions)) return ["homeserver", { address }];
        const path = this.base.pathname;
        if (path !== "/" && (await isBridge("/healthz"))) return ["path", { path, better }];
        const secure = { open: https.request, agent: new https.Agent({ rejectUnauthorized: false }) };
        const isSecure = this.open === http.request && (await isBridge(this.target("/healthz"), secure));
        return isSecure ? ["speaksHttps", { better: better.replace("http", "https") }] : undefined;
    }

    /** The JSON at a path, without a key: it may not be a bridge that gets it. */
    async look(path, { open = this.open, agent = this.fresh } = {}) {
        const request = { method: "GET", path, headers: this.headers(""), agent };
        const answer = await this.exchange(request, undefined, LOOK_SECONDS, undefined, open).catch(() => undefined);
        const found = answer && answer.status === 200 && parsed(answer.data);
        return found && typeof found === "object" ? found : {};
    }

    /** An error about the address: its `kind` and `values` let others say it in their language. */
    mistaken(kindOfError, kind, values, more) {
        return Object.assign(new kindOfError(this.words(kind, values), more), { kind, values });
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

function reason(error) {
    if (error.code === "ECONNREFUSED") return "connection refused";
    if (error.code === "ENOTFOUND" || error.code === "EAI_AGAIN") return "no such host";
    if (error.errors && error.errors.length) return reason(error.errors[0]);
    return error.message || error.code || "the connection broke";
}

module.exports = { Client, segments, written };
