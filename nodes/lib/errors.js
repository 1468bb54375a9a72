"use strict";
// What can go wrong, as errors whose messages are sentences for people.

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

module.exports = { BridgeError, Unreachable, InputError };
