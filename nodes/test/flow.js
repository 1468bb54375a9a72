"use strict";
// Flows of our nodes in a Node-RED without an editor, and what comes out of them.

const helper = require("node-red-node-test-helper");
const world = require("./world");

const NODES = ["server", "send", "react", "listen", "room", "account"].map((name) => require(`../flowbridge-${name}`));

helper.init(require.resolve("node-red"));

/**
 * Loads these nodes beside a server node "bridge" and a node "out" behind them. Resolves to what looks at them:
 * `node(id)`; `received`, what came to "out"; `ask(msg, id)`, which gives a message to a node (the first one) and
 * resolves to `{msg, error}` once that is done with it; `ends`, how often each message was done, by its `_msgid`;
 * `redeploy()`, as the Deploy button does with "full".
 */
async function load(nodes, { server = {}, key, more = [], credentials = {} } = {}) {
    const facts = await world.open();
    const flow = [
        { id: "tab", type: "tab" },
        { id: "bridge", type: "flowbridge-server", url: facts.bridge, timeout: 30, ...server },
        { id: "out", type: "helper", z: "tab", x: 1, y: 1 },
        ...nodes.map((node) => ({ z: "tab", x: 1, y: 1, server: "bridge", wires: [["out"]], ...node })),
    ];
    const secrets = { bridge: { key: key === undefined ? facts.key : key }, ...credentials };
    await helper.load([...NODES, ...more], flow, secrets);
    const found = { node: (id) => helper.getNode(id), received: [], ends: new Map(), waiting: new Map() };
    const look = () => {
        helper.getNode("out").on("input", (msg) => found.received.push(msg));
        for (const { id } of nodes) watch(helper.getNode(id), found);
    };
    look();
    found.ask = (msg, id = nodes[0].id) => ask(found, helper.getNode(id), msg);
    found.redeploy = async () => {
        await helper.setFlows(flow, "full", secrets);
        look();
    };
    return found;
}

/** Notes each end of a message. */
function watch(node, found) {
    const complete = node._complete;
    node._complete = function (msg, error) {
        const id = msg._msgid;
        found.ends.set(id, (found.ends.get(id) || 0) + 1);
        const tell = found.waiting.get(id);
        // What was sent is under way for a turn or two of the loop.
        if (tell) setImmediate(() => setImmediate(() => tell({ error, msg: found.received.findLast((each) => each._msgid === id) })));
        found.waiting.delete(id);
        return complete.call(node, msg, error);
    };
}

let number = 0;

function ask(found, node, msg) {
    const id = `message-${(number += 1)}`;
    Object.defineProperty(msg, "_msgid", { value: id, enumerable: true, configurable: true, writable: true });
    return new Promise((resolve) => {
        found.waiting.set(id, resolve);
        node.receive(msg);
    });
}

/** Ends the flow. */
async function unload() {
    await helper.unload();
    await world.mend();
}

/** What a node shows below itself: the spy is one for all nodes. */
function shown(node) {
    const last = node.status.getCalls().findLast(({ thisValue }) => thisValue === node);
    return last ? last.args[0] : {};
}

module.exports = { helper, load, shown, unload };
