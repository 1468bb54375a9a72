"use strict";
// The value of a node's property for a message. The only file in lib/ that is given RED.

const ENV = /\$\{[^}]+\}/;

/** A typed value that needs no message. A string may hold `${NAME}`. */
function evaluate(RED, node, value, type) {
    if (value === undefined || value === null) return undefined;
    const text = typeof value === "string" ? value.trim() : value;
    if (type === "env" || (type === "str" && ENV.test(text))) return RED.util.evaluateNodeProperty(text, "env", node);
    return RED.util.evaluateNodeProperty(text, type || "str", node);
}

/**
 * A typed value for this message, as `{value}`, undefined if there is none. It is boxed because a value with a `then` would be
 * taken for a promise. Types that only our editor has are strings.
 */
function valueOf(RED, node, msg, value, type) {
    if (["", "str", "env", "room", "eventType", "msgtype", "onUpdate"].includes(type || "")) {
        const kind = type === "env" ? "env" : "str";
        return Promise.resolve({ value: evaluate(RED, node, value, kind) });
    }
    return new Promise((resolve, reject) => {
        RED.util.evaluateNodeProperty(value, type, node, msg, (error, found) => {
            if (error) reject(new Error(`${type} ${value}: ${error.message}`));
            else resolve({ value: found });
        });
    });
}

module.exports = { evaluate, valueOf };
