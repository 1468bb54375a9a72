"use strict";
// Sends a payload into a room: as a message that the bridge makes events of, as an event, or as a file.

const { randomUUID } = require("node:crypto");

const { segments, written } = require("./lib/client");
const content = require("./lib/content");
const { InputError } = require("./lib/errors");
const message = require("./lib/message");
const { copyOf, dead, fail, roomOf, serverOf, show, tokenOf } = require("./lib/node");
const { Outbox } = require("./lib/outbox");
const { valueOf } = require("./lib/values");

const CLOSE = 10_000; // ms: Node-RED waits 15 s for a node to close
const PATIENCE_MINUTES = 10;
const MAX_INSIDE = 2 * 1024 * 1024; // bytes of Buffers that go along in a message; JSON takes more memory than an upload
const FETCH_SECONDS = 90; // what the bridge may take for a file from an address, its turn included
// The message's keys by the names of their fields in the dialog.
const OPTIONS = {
    title: "title",
    msgtype: "msgtype",
    mentions: "mentions",
    replyTo: "reply_to",
    thread: "thread",
    edit: "edit",
    messageKey: "key",
    onUpdate: "on_update",
    attachments: "attachments",
};
const KEY = /^[\x20-\x7e]{1,255}$/;

module.exports = function (RED) {
    class Send {
        constructor(config) {
            RED.nodes.createNode(this, config);
            this.config = config;
            this.queues = config.mode === "queue";
            const minutes = Number(config.patience);
            this.outbox = new Outbox({
                patience: this.queues ? (minutes > 0 ? minutes : PATIENCE_MINUTES) * 60_000 : 0,
                changed: (waiting, trouble) => this.tell(waiting, trouble),
            });
            this.rest();
            this.inOrder = Promise.resolve(); // expressions may be slow, and no message may overtake another
            this.on("input", (msg, send, done) => {
                const reading = this.inOrder.then(() => this.read(msg));
                this.inOrder = reading.catch(() => {});
                reading.then((request) => this.deliver(request, msg, send)).then(
                    () => done(),
                    (error) => fail(this, msg, done, error),
                );
            });
            this.on("close", (removed, done) => {
                this.closing = true;
                this.inOrder.then(() => this.outbox.close(CLOSE)).then(() => {
                    this.status({});
                    done();
                });
            });
        }

        /**
         * The request that a message makes: `{server, room, path, body, key, token, says, events, seconds, files}`. `says`: whether
         * it is a message for people; `events`: how many it becomes; `seconds`: what it may take beside the client's timeout;
         * `files`, each `{data, label}`, are uploaded first: then each is `stored`, and `complete()` is the body.
         */
        async read(msg) {
            const config = this.config;
            const typed = (name) => valueOf(RED, this, msg, config[name], config[`${name}Type`]);
            const server = serverOf(RED, config.server);
            server.usable();
            const isMessage = message.FORMATS.includes(config.as); // else it is an event, also for flows from before there was a choice
            const { value: payload } = config.payloadType ? await typed("payload") : { value: msg.payload };
            const said = isMessage ? message.read(payload, { ...(await this.options(typed)), msg }) : undefined;
            const room = roomOf((await typed("room")).value, msg, { users: Boolean(said) });
            const key = keyOf((await typed("key")).value);
            const common = { server, room, key, token: tokenOf(msg), says: Boolean(said), events: 1, seconds: 0, files: [] };
            if (said) return { ...common, ...messageRequest(said, room) };
            const type = (!isMessage && (await typed("eventType")).value) || content.MESSAGE;
            if (typeof type !== "string") throw new InputError("the event type is not a string", "/eventType");
            return { ...common, ...eventRequest(content.read(payload, type), room, msg) };
        }

        /** How a payload becomes a message, as lib/message.js takes it. */
        async options(typed) {
            const options = {};
            for (const [name, key] of Object.entries(OPTIONS)) {
                if (String(this.config[name] ?? "").trim()) options[key] = (await typed(name)).value;
            }
            if (options.msgtype === "m.text") delete options.msgtype; // what it is anyway
            return { format: this.config.as, refuses: this.config.objects === "refuse", options };
        }

        async deliver(request, msg, send) {
            const answer = await this.outbox.send(request.room, (signal) => this.attempt(request, signal));
            const deliveryId = answer.headers["flowbridge-delivery"];
            if (answer.status === 202) for (const id of deliveriesOf(deliveryId, request.events)) this.watch(id, request, msg);
            msg.payload = answer.body;
            msg.eventId = answer.body.event_id;
            if (request.says) msg.events = answer.body.events;
            msg.roomId = request.room;
            if (deliveryId) msg.deliveryId = deliveryId;
            this.warnOf(answer.body.flowbridge);
            this.rest(answer.status === 202 ? "accepted" : "sent");
            send(msg);
        }

        /** Some events of a message may be refused while others are in the room. */
        warnOf({ failed = [] } = {}) {
            for (const { error } of failed) this.warn(RED._("flowbridge-send.status.partly", { error }));
        }

        /** Has the server learn what becomes of an accepted event; this node tells it, or the one that a deploy makes of it. */
        watch(id, { server, token, body, files }, msg) {
            const { id: owner, type } = this;
            const size = files.reduce((sum, { data }) => sum + data.length, body.length);
            const copy = copyOf(RED, msg); // what follows in the flow may change it
            const tell = (outcome) => {
                const node = RED.nodes.getNode(owner);
                if (!node || node.type !== type || node.closing) return false;
                node.end(id, outcome, copy);
                return true;
            };
            server.deliveries.watch({ id, key: token, owner, size, tell });
        }

        /** An accepted event is in its room, or dead, or the bridge cannot tell: then the outcome is an Error. */
        end(id, outcome, msg) {
            msg.deliveryId = id;
            if (outcome.status === "sent") this.rest("sent");
            else fail(this, msg, (error) => this.error(error, msg), dead(outcome));
            if (!this.config.outcome) return;
            const unknown = { delivery_id: id, status: "unknown", error: { error: outcome.message } };
            const payload = outcome instanceof Error ? unknown : outcome;
            this.send([null, Object.assign(msg, { payload, roomId: outcome.room_id, eventId: outcome.event_id })]);
        }

        /** Shows how many events are on their way, or with none the last outcome: sent, accepted, or nothing. */
        rest(last) {
            if (this.closing || this.outbox.waiting) return;
            const server = RED.nodes.getNode(this.config.server);
            const waiting = server && server.deliveries ? server.deliveries.waiting(this.id) : 0;
            if (waiting) show(this, "queued", RED._("flowbridge-send.status.underway", { waiting }));
            else if (last) show(this, last === "sent" ? "connected" : "queued", RED._(`flowbridge-send.status.${last}`));
        }

        /** Uploads the files that are not uploaded yet, and sends the message or the event. */
        async attempt(request, signal) {
            const { client } = request.server;
            for (const file of request.files) {
                file.stored ??= await client.upload(file.data, { ...file.label, key: request.token, signal });
            }
            const body = request.complete ? written(request.complete()) : request.body;
            const headers = { "idempotency-key": request.key };
            if (this.queues) headers.prefer = "respond-async";
            const timeout = client.timeout + request.seconds;
            return client.call("POST", request.path, { body, headers, key: request.token, timeout, signal });
        }

        tell(waiting, trouble) {
            if (this.closing || !waiting) return;
            if (trouble) show(this, "queued", RED._("flowbridge-send.status.waiting", { waiting, trouble }));
            else show(this, "sending", RED._("flowbridge-send.status.sending", { waiting }));
        }
    }

    RED.nodes.registerType("flowbridge send", Send);
};

/** A message for `POST …/messages`. Encoded at once, as an event is: a flow may change its objects while they wait. */
function messageRequest({ message: said, files }, room) {
    const path = segments("rooms", room, "messages");
    const { attachments = [] } = said;
    const hasText = message.FORMATS.some((format) => format in said);
    const events = Number(hasText) + attachments.length;
    const common = { path, events, seconds: attachments.filter(({ url }) => url).length * FETCH_SECONDS };
    if (files.reduce((sum, { data }) => sum + data.length, 0) <= MAX_INSIDE) {
        for (const { at, data } of files) attachments[at].data = data.toString("base64");
        return { ...common, body: written(said) };
    }
    const body = written(said);
    const complete = () => {
        const found = JSON.parse(body);
        for (const { at, stored } of files) Object.assign(found.attachments[at], { content_uri: stored.content_uri, info: stored.info });
        return found;
    };
    return { ...common, body, files, complete };
}

/** The deliveries of a message with so many events. */
function deliveriesOf(id, events) {
    return Array.from({ length: Math.max(1, events) }, (_, at) => (at ? `${id}.${at}` : id));
}

/** An event for `POST …/send/{type}`. */
function eventRequest({ type, content: found, file: data }, room, msg) {
    const path = segments("rooms", room, "send", type);
    if (!data) return { path, body: written(found) };
    const file = { data, label: content.label(data, msg) };
    const body = Buffer.alloc(0);
    return { path, body, files: [file], complete: () => content.fileMessage(file.stored, data.length, file.label) };
}

/** The Idempotency-Key: the node's, or a unique one. */
function keyOf(given) {
    if (given === undefined || given === null || given === "") return randomUUID();
    const key = typeof given === "object" ? "" : String(given).trim();
    if (!KEY.test(key)) throw new InputError("the idempotency key is 1 to 255 visible ASCII characters", "/key");
    return key;
}
