"use strict";
// What becomes of the events that the bridge has accepted: one question about many of them, until each is sent or dead.
// Independent of Node-RED.

const GATHER = 1_000; // ms between two questions: events that are accepted one after another are asked about together
const FIRST_PAUSE = 1_000; // ms before an event is asked about; doubled each time that it is still queued
const MAX_PAUSE = 30_000;
const MAX_NAMED = 100; // ids in one question: what the bridge takes
const MAX_WATCHED = 10_000; // events
const MAX_BYTES = 64 * 1024 * 1024; // of their messages, which are in memory
const MAX_MISSED = 5; // times that nobody takes an outcome: half a minute at least, and a deploy takes less

class Deliveries {
    /** `full(number)`: so many events could not be watched so far; called for the first one, and when there is room again. */
    constructor({ full = () => {}, first = FIRST_PAUSE, gather = GATHER, most = MAX_WATCHED, mostBytes = MAX_BYTES } = {}) {
        Object.assign(this, { full, first, gather, most, mostBytes });
        this.watched = new Map(); // by the delivery's id
        this.bytes = 0;
        this.counts = new Map(); // by owner
        this.dropped = 0;
        this.pause = 0; // after a question that got no answer
        this.notBefore = 0; // when the next question may be asked
    }

    /** How many events of an owner are watched. */
    waiting(owner) {
        return this.counts.get(owner) || 0;
    }

    /** Begins, or goes on, to ask this client. */
    start(client) {
        this.client = client;
        this.pause = this.notBefore = 0;
        this.stopping = new AbortController();
        this.arrange(this.earliest());
    }

    /** Asks nothing more; what is watched stays, for the next start. */
    stop() {
        clearTimeout(this.timer);
        this.timer = undefined;
        if (this.stopping) this.stopping.abort();
        this.client = undefined;
    }

    /**
     * Watches a delivery; returns whether there was room for it. `key`: who may see it, instead of the client's own key;
     * `owner`: whose it is; `size`: what its message takes, in bytes. `tell(outcome)` is called with the delivery once it is
     * sent or dead, or with an Error when that cannot be known; again and again, if it returns false, for some seconds.
     */
    watch({ id, key, owner, size, tell }) {
        if (this.watched.has(id)) return true; // the same idempotency key
        if (this.watched.size >= this.most || this.bytes + size > this.mostBytes) {
            this.dropped += 1;
            if (this.dropped === 1) this.full(1);
            return false;
        }
        const each = { id, key, owner, size, tell, pause: this.first, missed: 0 };
        this.add(each);
        this.arrange(each.due);
        return true;
    }

    add(each) {
        this.watched.set(each.id, each);
        this.bytes += each.size;
        this.counts.set(each.owner, this.waiting(each.owner) + 1);
        this.later(each);
    }

    /** Sets the timer for the next question, which is due then; there is one at a time. */
    arrange(due) {
        if (!this.client || this.asking || !this.watched.size) return;
        if (this.timer && this.next <= due) return;
        clearTimeout(this.timer);
        this.next = due;
        this.timer = setTimeout(() => this.ask(), Math.max(due, this.notBefore) - Date.now());
    }

    earliest() {
        let due = Infinity;
        for (const each of this.watched.values()) due = Math.min(due, each.due);
        return due;
    }

    async ask() {
        const { client, stopping } = this;
        this.timer = undefined;
        this.asking = true;
        const some = this.due();
        try {
            const query = { id: some.map(({ id }) => id).join(","), limit: MAX_NAMED };
            const { body } = await client.call("GET", "/deliveries", { query, key: some[0].key, signal: stopping.signal });
            const found = new Map(body.deliveries.map((each) => [each.delivery_id, each]));
            this.pause = 0;
            for (const each of some) this.learn(each, found.get(each.id));
        } catch (error) {
            if (error.passes) this.pause = Math.max(error.retryAfter || 0, Math.min(this.pause * 2 || this.first, MAX_PAUSE));
            else for (const each of some) this.settle(each, unknown(error.message, error));
        }
        this.asking = false;
        this.notBefore = Date.now() + (this.pause || (some.length < MAX_NAMED ? this.gather : 0));
        this.arrange(this.earliest());
    }

    /** Those that are to be asked about in one question: the account that may see them is the same. */
    due() {
        const now = Date.now();
        const due = [...this.watched.values()].filter((each) => each.due <= now + this.gather).sort((one, other) => one.due - other.due);
        return due.filter(({ key }) => key === due[0].key).slice(0, MAX_NAMED);
    }

    learn(each, delivery) {
        if (!delivery) this.settle(each, unknown(`the bridge does not know ${each.id} any more`));
        else if (delivery.status === "queued") this.later(each);
        else this.settle(each, delivery);
    }

    later(each) {
        each.due = Date.now() + each.pause;
        each.pause = Math.min(each.pause * 2, MAX_PAUSE);
    }

    settle(each, outcome) {
        const left = this.waiting(each.owner) - 1;
        if (left) this.counts.set(each.owner, left);
        else this.counts.delete(each.owner);
        this.watched.delete(each.id);
        this.bytes -= each.size;
        if (!taken(each, outcome) && each.missed < MAX_MISSED) this.add({ ...each, missed: each.missed + 1 });
        if (this.dropped && this.watched.size < this.most * 0.9 && this.bytes < this.mostBytes * 0.9) {
            this.full(this.dropped);
            this.dropped = 0;
        }
    }
}

function taken({ tell }, outcome) {
    try {
        return tell(outcome) !== false;
    } catch {
        return true; // of no concern to the others
    }
}

function unknown(why, { status, errcode } = {}) {
    return Object.assign(new Error(`what became of this message is unknown: ${why}`), { status, errcode });
}

module.exports = { Deliveries };
