"use strict";
// Sends a payload into a room, as an event or as a file.

const { randomUUID } = require("node:crypto");

const { segments, written } = require("./lib/client");
const content = require("./lib/content");
const { InputError } = require("./lib/errors");
const { fail, roomOf, serverOf, show, tokenOf } = require("./lib/node");
const { Outbox } = require("./lib/outbox");
const { valueOf } = require("./lib/values");

const CLOSE = 10_000; // ms: Node-RED waits 15 s for a node to close
const PATIENCE_MINUTES = 10;
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

        /** The request that a message makes: `{server, room, type, key, token, body | file, label}`. */
        async read(msg) {
            const config = this.config;
            const typed = (name) => valueOf(RED, this, msg, config[name], config[`${name}Type`]);
            const server = serverOf(RED, config.server);
            server.usable();
            const room = roomOf((await typed("room")).value, msg);
            const type = (await typed("eventType")).value || content.MESSAGE;
            if (typeof type !== "string") throw new InputError("the event type is not a string", "/eventType");
            const payload = config.payloadType ? await typed("payload") : { value: msg.payload };
            const found = content.read(payload.value, type);
            const request = { server, room, type: found.type, token: tokenOf(msg), key: keyOf((await typed("key")).value) };
            // Encoded at once: a flow may change its objects while they wait.
            if (!found.file) return { ...request, body: written(found.content) };
            return { ...request, file: found.file, label: content.label(found.file, msg) };
        }

        async deliver(request, msg, send) {
            const answer = await this.outbox.send(request.room, (signal) => this.attempt(request, signal));
            const deliveryId = answer.headers["flowbridge-delivery"];
            if (answer.status === 202) this.watch(deliveryId, request, msg);
            msg.payload = answer.body;
            msg.eventId = answer.body.event_id;
            msg.roomId = request.room;
            if (deliveryId) msg.deliveryId = deliveryId;
            this.rest(msg.eventId ? "sent" : "accepted");
            send(msg);
        }

        /** Has the server learn what becomes of an accepted event; this node tells it, or the one that a deploy makes of it. */
        watch(id, { server, token, body, file }, msg) {
            const { id: owner, type } = this;
            const size = body.length + (file ? file.length : 0);
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

        /** Uploads the file, if it is not uploaded yet, and sends the event. */
        async attempt(request, signal) {
            const { client } = request.server;
            if (request.file && !request.url) {
                request.url = await client.upload(request.file, { ...request.label, key: request.token, signal });
                const found = content.fileMessage(request.url, request.file.length, request.label);
                request.body = written(found);
            }
            const headers = { "idempotency-key": request.key };
            if (this.queues) headers.prefer = "respond-async";
            const path = segments("rooms", request.room, "send", request.type);
            return client.call("POST", path, { body: request.body, headers, key: request.token, signal });
        }

        tell(waiting, trouble) {
            if (this.closing || !waiting) return;
            if (trouble) show(this, "queued", RED._("flowbridge-send.status.waiting", { waiting, trouble }));
            else show(this, "sending", RED._("flowbridge-send.status.sending", { waiting }));
        }
    }

    RED.nodes.registerType("flowbridge send", Send);
};

/** The message as it is now; of one that cannot be copied, what finds it again. */
function copyOf(RED, msg) {
    try {
        return RED.util.cloneMessage(msg);
    } catch {
        return { _msgid: msg._msgid };
    }
}

/** Why an accepted event did not reach its room, as an error like that of an event which is refused at once. */
function dead(outcome) {
    if (outcome instanceof Error) return outcome;
    const { status, errcode, error } = outcome.error || {};
    return Object.assign(new Error(error || errcode || "the event was given up"), { status, errcode });
}

/** The Idempotency-Key: the node's, or a unique one. */
function keyOf(given) {
    if (given === undefined || given === null || given === "") return randomUUID();
    const key = typeof given === "object" ? "" : String(given).trim();
    if (!KEY.test(key)) throw new InputError("the idempotency key is 1 to 255 visible ASCII characters", "/key");
    return key;
}
