"use strict";
// Answers a message without words: a reaction, its removal, a read receipt; or shows that an answer is being typed.

const { randomUUID } = require("node:crypto");

const { segments } = require("./lib/client");
const { InputError } = require("./lib/errors");
const { copyOf, dead, fail, operationOf, serverOf, show, worker } = require("./lib/node");

const TYPING_SECONDS = 30; // for a plain "yes": clients repeat theirs about as often
const WATCHED_BYTES = 1024; // of a message whose reaction is on its way, beside a payload that is a text or a Buffer
const MAX_TYPING_SECONDS = 300; // a flow that breaks off must not type for ever

module.exports = function (RED) {
    class React {
        constructor(config) {
            RED.nodes.createNode(this, config);
            this.config = config;
            this.signal = worker(this, (msg) => this.work(msg));
        }

        /** The properties that the message gets; the others go on as they came, to whatever answers it. */
        async work(msg) {
            const server = serverOf(RED, this.config.server);
            server.usable();
            const { operation, room, typed, more } = await operationOf(RED, this, msg, OPERATIONS);
            const call = (method, path, options) => server.call(method, path, { ...options, ...more });
            const { value } = operation.value ? await typed(operation.value) : {};
            const target = operation.target ? targetOf((await typed("target")).value) : undefined;
            show(this, "sending", RED._("flowbridge-react.status.working"));
            const found = await operation.do({ call, room, target, value: value ?? "" });
            const [{ delivery_id: id, status } = {}] = Object.values(found || {});
            if (status) this.watch(server, id, more.key, msg);
            const shown = status ? ["queued", "accepted"] : ["connected", "done"];
            if (!more.signal.aborted) show(this, shown[0], RED._(`flowbridge-react.status.${shown[1]}`));
            return found;
        }

        /** What is accepted, and dies later, goes to Catch nodes as it came; also from the node that a deploy makes of this one. */
        watch(server, id, key, msg) {
            const { id: owner, type } = this;
            const copy = copyOf(RED, msg);
            const size = WATCHED_BYTES + (Number(copy.payload?.length) || 0);
            const tell = (outcome) => {
                const node = RED.nodes.getNode(owner);
                if (!node || node.type !== type) return false;
                if (outcome.status === "sent") show(node, "connected", RED._("flowbridge-react.status.done"));
                else fail(node, Object.assign(copy, { deliveryId: id }), (error) => node.error(error, copy), dead(outcome));
                return true;
            };
            server.deliveries.watch({ id, key, owner, size, tell });
        }
    }

    RED.nodes.registerType("flowbridge react", React);
};

// `users`: whether the room may be a user's direct room; `value`: the field that holds what the operation needs.
const OPERATIONS = {
    react: { users: true, target: true, value: "emoji", do: react },
    redact: { users: true, target: true, value: "reason", do: redact },
    read: { target: true, do: read },
    typing: { value: "seconds", do: typing },
};

/** `msg.reaction`: the answer, `{event_id, delivery_id}`; its event id is the target for removing it again. */
async function react({ call, room, target, value }) {
    return { reaction: await durable(call, segments("rooms", room, "reactions"), { target, key: textOf(value, "the reaction", "/key") }) };
}

async function redact({ call, room, target, value }) {
    const reason = textOf(value, "the reason", "/reason");
    return { redaction: await durable(call, segments("rooms", room, "redactions"), reason ? { target, reason } : { target }) };
}

async function durable(call, path, body) {
    return (await call("POST", path, { body, headers: { "idempotency-key": randomUUID() } })).body;
}

async function read({ call, room, target }) {
    if (!target.startsWith("$")) throw new InputError("a read receipt is for an event that is in its room: give its id ($…)", "/target");
    await userOf(call);
    await call("POST", matrix("rooms", await idOf(call, room), "receipt", "m.read", target), { body: {} });
}

async function typing({ call, room, value }) {
    const seconds = secondsOf(value);
    const user = await userOf(call);
    const body = seconds ? { typing: true, timeout: Math.round(seconds * 1000) } : { typing: false };
    await call("PUT", matrix("rooms", await idOf(call, room), "typing", user), { body });
}

const matrix = (...parts) => `/_matrix/client/v3${segments(...parts)}`;

/** Who we are. Throws InputError for a key that may not use Matrix' own API, to which receipts and typing go. */
async function userOf(call) {
    const { user_id: user, flowbridge } = (await call("GET", "/whoami")).body;
    const { admin = true, rooms = [], event_types: types = [] } = (flowbridge && flowbridge.key) || {};
    if (admin && !rooms.length && !types.length) return user;
    throw new InputError(
        "this API key is not for typing notices and read receipts, which are Matrix' own API: use a key with admin and without " +
            "limits (flowbridge keys create --admin), or an account's access token",
    );
}

async function idOf(call, room) {
    return room.startsWith("#") ? (await call("GET", matrix("directory", "room", room))).body.room_id : room;
}

function targetOf(given) {
    const target = typeof given === "string" ? given.trim() : "";
    if (target) return target;
    throw new InputError("which message? The target is an event id ($…), the id of a delivery, or key:NAME; msg.eventId is the one that listen and send give", "/target");
}

function textOf(value, what, pointer) {
    if (!["string", "number", "boolean", "bigint"].includes(typeof value)) throw new InputError(`${what} is a text`, pointer);
    return String(value);
}

/** For how long; 0 ends it. A plain yes or no is enough. */
function secondsOf(value) {
    if (typeof value === "boolean") return value ? TYPING_SECONDS : 0;
    const seconds = ["string", "number"].includes(typeof value) ? Number(value) : NaN;
    if (seconds >= 0 && seconds <= MAX_TYPING_SECONDS) return seconds;
    throw new InputError(`for how long is a number of seconds, at most ${MAX_TYPING_SECONDS}; 0 ends it`, "/seconds");
}
