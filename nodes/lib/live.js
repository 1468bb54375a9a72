"use strict";
// A stream of live events (Server-Sent Events) that reconnects by itself. Independent of Node-RED.

const { EventEmitter } = require("node:events");
const { StringDecoder } = require("node:string_decoder");

const FIRST_PAUSE = 500; // ms; doubled with each attempt that fails
const MAX_PAUSE = 30_000;
const REFUSED_PAUSE = 60_000; // a refused key is seldom replaced within seconds
const SILENCE = 45_000; // the bridge sends a keep-alive every 15 s
const MAX_ERROR_BYTES = 64 * 1024;
const MAX_MESSAGE = 8 * 1024 * 1024; // characters, more than any event has

/**
 * Emits `event` (the event, its id), `open`, `lost` (a sentence, whether the bridge refuses us, its answer's status).
 * `position`: where to continue, "" for now; it advances with each event.
 */
class Live extends EventEmitter {
    constructor(client, { path = "/live", query = {}, position = "", first = FIRST_PAUSE } = {}) {
        super();
        this.client = client;
        this.path = path;
        this.query = query;
        this.position = position;
        this.first = first;
        this.pause = first;
        this.ended = false;
    }

    start() {
        if (!this.ended) this.connect();
    }

    stop() {
        this.ended = true;
        clearTimeout(this.timer);
        clearTimeout(this.watch);
        if (this.call) this.call.destroy();
    }

    connect() {
        const headers = { ...this.client.headers(), accept: "text/event-stream" };
        if (this.position) headers["last-event-id"] = this.position;
        const target = this.client.target(this.path, this.query);
        const request = { method: "GET", path: target, headers, agent: this.client.fresh };
        let isOver = false;
        const over = (why, how) => {
            if (isOver) return;
            isOver = true;
            clearTimeout(this.watch);
            call.destroy();
            this.lose(why, how);
        };
        let call;
        try {
            call = this.client.open(this.client.options(request), (answer) => {
                const isStream = /^text\/event-stream\b/.test(answer.headers["content-type"]);
                if (answer.statusCode === 200 && isStream) this.read(answer, over);
                else this.refuse(answer, over);
            });
        } catch (error) {
            this.lose(`the request cannot be made: ${error.message}`, { refused: true });
            return;
        }
        this.call = call;
        call.on("error", (error) => over(this.client.unreachable(error).message));
        call.end();
        this.listen(over);
    }

    /** Restarts the timer that ends a silent stream. */
    listen(over) {
        clearTimeout(this.watch);
        this.watch = setTimeout(() => over(`the stream fell silent: ${this.client.base.href}`), SILENCE);
    }

    read(answer, over) {
        const parser = new Parser((message) => this.take(message, over));
        this.emit("open");
        answer.on("data", (data) => {
            this.pause = this.first;
            this.listen(over);
            if (!parser.feed(data)) over(`${this.client.base.href} sends no events`);
        });
        answer.on("end", () => over("the bridge ended the stream"));
        answer.on("error", (error) => over(this.client.unreachable(error).message));
    }

    take({ id, data, event }, over) {
        if (this.ended) return;
        if (event === "error") {
            const { errcode, error } = json(data) || {};
            over(error || "the bridge ended the stream", { refused: errcode === "M_UNKNOWN_TOKEN" });
            return;
        }
        if (event && event !== "message") return; // an invitation, or what a later bridge may have to say
        const found = data === undefined ? undefined : json(data);
        if (id) this.position = id; // before the event is emitted: its listener may save the position
        if (found) this.emit("event", found, this.position);
    }

    refuse(answer, over) {
        let text = "";
        answer.on("data", (data) => {
            text += data;
            if (text.length > MAX_ERROR_BYTES) answer.destroy();
        });
        answer.on("close", async () => {
            const status = answer.statusCode;
            if (status === 400 && this.position) this.position = ""; // of another homeserver, or too old
            const { message } = await this.client.refusal(status, answer.headers, json(text));
            over(message, { refused: [200, 401, 403, 404].includes(status), status });
        });
    }

    lose(why, { refused = false, status } = {}) {
        if (this.ended) return;
        this.emit("lost", why, refused, status);
        const pause = refused ? REFUSED_PAUSE : this.pause * (0.5 + Math.random() / 2);
        this.pause = Math.min(this.pause * 2, MAX_PAUSE);
        this.timer = setTimeout(() => this.connect(), pause);
    }
}

/** Bytes in, messages out: `{id, data, event}` (WHATWG HTML, "Interpreting an event stream"). */
class Parser {
    constructor(tell) {
        this.tell = tell;
        this.decoder = new StringDecoder("utf8");
        this.rest = "";
        this.message = {};
    }

    /** Whether this can still be an event stream. */
    feed(data) {
        const lines = (this.rest + this.decoder.write(data)).split(/\r\n|\n|\r(?!$)/);
        this.rest = lines.pop();
        for (const line of lines) this.line(line);
        return this.rest.length < MAX_MESSAGE;
    }

    line(line) {
        if (line === "") {
            if (Object.keys(this.message).length) this.tell(this.message);
            this.message = {};
            return;
        }
        const [, name, value] = /^([^:]*):? ?(.*)$/s.exec(line);
        if (name === "data" && this.message.data !== undefined) this.message.data += `\n${value}`;
        else if (["id", "data", "event"].includes(name)) this.message[name] = value;
    }
}

function json(text) {
    try {
        const found = JSON.parse(text);
        return found && typeof found === "object" ? found : undefined;
    } catch {
        return undefined;
    }
}

module.exports = { Live, Parser };
