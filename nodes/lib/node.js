"use strict";
// Shared by the nodes: their server, their status, and how a message ends.

const { InputError } = require("./errors");
const { valueOf } = require("./values");
const { english } = require("./words");

const STATUS = {
    connected: { fill: "green", shape: "dot" },
    sending: { fill: "blue", shape: "dot" },
    queued: { fill: "yellow", shape: "ring" },
    waiting: { fill: "yellow", shape: "dot" },
    error: { fill: "red", shape: "ring" },
};
const MAX_TEXT = 60; // characters below a node

/** The server node of a node's configuration. Throws InputError when there is none. */
function serverOf(RED, id) {
    const server = RED.nodes.getNode(id);
    if (!server || !server.usable) throw new InputError("no flowbridge server is chosen in this node, or it is not deployed");
    return server;
}

function show(node, kind, text) {
    const line = String(text).split("\n")[0];
    node.status({ ...STATUS[kind], text: line.length > MAX_TEXT ? `${line.slice(0, MAX_TEXT - 1)}…` : line });
}

/**
 * Ends a failed message, once: `done(err)`, with `err.problems`. Catch nodes see a copy of the message, so the problems, the
 * errcode and the status are also in `msg.problems`, `msg.errcode` and `msg.statusCode`.
 */
function fail(node, msg, done, thrown) {
    const error = thrown instanceof Error ? thrown : new Error(String(thrown));
    error.problems = error.problems || [];
    error.toString = () => error.message; // what Catch nodes and the log show
    show(node, "error", error.message);
    try {
        Object.assign(msg, { problems: error.problems, errcode: error.errcode, statusCode: error.status });
    } catch {
        // a frozen message, or one with odd setters: the error has it all anyway
    }
    done(error);
}

/**
 * Makes a node that works on each message: `work(msg)` resolves to the properties that the message gets. Returns the
 * signal that ends its calls when the node is closed.
 */
function worker(node, work) {
    const stopping = new AbortController();
    node.on("input", (msg, send, done) => {
        work(msg).then(
            (found) => {
                Object.assign(msg, found);
                send(msg);
                done();
            },
            (error) => fail(node, msg, done, error),
        );
    });
    node.on("close", () => {
        stopping.abort();
        node.status({});
    });
    return stopping.signal;
}

/**
 * What an operation of a node needs: `{operation, room, typed, more}`. `typed(name)`: a field of its dialog; `more`: the
 * options of each of its calls. Throws InputError.
 */
async function operationOf(RED, node, msg, operations) {
    const { config } = node;
    const typed = (name) => valueOf(RED, node, msg, config[name], config[`${name}Type`]);
    const operation = operations[config.operation];
    if (!operation) throw new InputError("choose what the node does");
    const room = operation.anywhere ? undefined : roomOf((await typed("room")).value, msg, { users: operation.users });
    return { operation, room, typed, more: { key: tokenOf(msg), signal: node.signal } };
}

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

/** The room of a message: the node's own, else `msg.roomId`, else `msg.topic`; `users`: as in `roomNamed`. Throws InputError. */
function roomOf(given, msg, { users = false } = {}) {
    const name = [given, msg.roomId, msg.topic].find((each) => each !== undefined && each !== null && each !== "");
    if (name === undefined) {
        throw new InputError("which room? Neither the node nor msg.roomId nor msg.topic names one", "/roomId");
    }
    return roomNamed(name, { users });
}

/** A room's id or alias, trimmed; `users`: or a user's id, for the direct room with them. Throws InputError for anything else. */
function roomNamed(name, { users = false } = {}) {
    const room = typeof name === "string" ? name.trim() : "";
    if (users && /^@./.test(room)) return room;
    if (!/^[!#]./.test(room)) {
        const direct = users ? ", a user whose direct room it is with '@'" : "";
        throw new InputError(`this is not a room: a room id begins with '!', an alias with '#'${direct}`, "/roomId");
    }
    return room;
}

/** The token of the account that this message is to act as: `msg.accessToken`, or undefined for the server's key. */
function tokenOf(msg) {
    const token = msg.accessToken;
    if (token === undefined || token === null || token === "") return undefined;
    if (typeof token !== "string") throw new InputError("msg.accessToken is not a string", "/accessToken");
    return token.trim();
}

/** What says the sentences of a node's file in Node-RED's language, by their names under `group`; else in English. */
function wordsOf(RED, node, group) {
    const inEnglish = english(node, group);
    return (name, values) => {
        const key = `${node}.${group}.${name}`;
        const text = RED._(key, values);
        return text === key ? inEnglish(name, values) : text;
    };
}

module.exports = { serverOf, show, fail, worker, operationOf, copyOf, dead, roomNamed, roomOf, tokenOf, wordsOf };
