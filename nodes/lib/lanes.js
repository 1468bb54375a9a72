"use strict";
// Ordered work: one at a time in each lane, lanes in parallel.

class Lanes {
    /** `most`: how many may wait, in all lanes together. */
    constructor(most) {
        this.most = most;
        this.size = 0;
        this.last = new Map();
    }

    /** Whether no more work is accepted. */
    get full() {
        return this.size >= this.most;
    }

    /** Does `work` once all earlier work of the lane has settled; resolves or rejects with it. */
    run(lane, work) {
        this.size += 1;
        const before = this.last.get(lane) || Promise.resolve();
        const done = before.then(work).finally(() => {
            this.size -= 1;
            if (this.last.get(lane) === done) this.last.delete(lane);
        });
        this.last.set(lane, done);
        return done;
    }

    /** Resolves when all work has settled. */
    async idle() {
        while (this.size) await Promise.allSettled(this.last.values());
    }
}

module.exports = { Lanes };
