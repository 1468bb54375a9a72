"use strict";
// Registers an account, logs in, tells who you are.

const { InputError } = require("./lib/errors");
const { fail, serverOf, show, tokenOf } = require("./lib/node");
const { valueOf } = require("./lib/values");

module.exports = function (RED) {
    class Account {
        constructor(config) {
            RED.nodes.createNode(this, config);
            this.config = config;
            this.on("input", (msg, send, done) => {
                this.work(msg).then(
                    (payload) => {
                        msg.payload = payload;
                        show(this, "connected", payload.user_id);
                        send(msg);
                        done();
                    },
                    (error) => fail(this, msg, done, error),
                );
            });
            this.on("close", () => this.status({}));
        }

        async work(msg) {
            const { config } = this;
            const server = serverOf(RED, config.server);
            const operation = OPERATIONS[config.operation];
            if (!operation) throw new InputError("choose what the node does");
            const ask = config.operation === "whoami" ? { token: tokenOf(msg) } : await this.names(msg);
            show(this, "sending", RED._("flowbridge-account.status.working"));
            return (await operation(server, ask)).body;
        }

        async names(msg) {
            const { user, userType } = this.config;
            const { value } = await valueOf(RED, this, msg, user, userType);
            const password = (this.credentials && this.credentials.password) || msg.password;
            return { user: textOf(value, "the user name", "/user"), password: textOf(password, "the password", "/password") };
        }
    }

    RED.nodes.registerType("flowbridge account", Account, { credentials: { password: { type: "password" } } });
};

const OPERATIONS = {
    register: (server, { user, password }) => {
        const body = { ...(user && { user_id: user }), ...(password && { password }) };
        return server.call("POST", "/register", { body, key: "" });
    },
    login: (server, { user, password }) => {
        if (!user) throw new InputError("the user name is missing", "/user");
        if (!password) throw new InputError("the password is missing: in the node, or in msg.password", "/password");
        return server.call("POST", "/login", { body: { type: "m.login.password", user, password }, key: "" });
    },
    whoami: (server, { token }) => server.call("GET", "/whoami", { key: token }),
};

function textOf(value, what, pointer) {
    if (value === undefined || value === null || value === "") return "";
    if (typeof value !== "string") throw new InputError(`${what} is not a string`, pointer);
    return value;
}
