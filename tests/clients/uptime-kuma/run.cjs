// One of Uptime Kuma's notifications says a text. On stdin, as JSON: `type` (Matrix or Webhook), `fields`, by the labels
// of its dialog, `text`, and what has happened to which `monitor`, unless it is a test: its `heartbeat`.

const { readFileSync } = require("node:fs");
const { text } = require("node:stream/consumers");
const labels = require("uptime-kuma/src/lang/en.json");

const OPTIONAL = ["webhookAdditionalHeaders"];

async function main() {
    const { type = "Matrix", fields, text: said, monitor = null, heartbeat = null } = JSON.parse(await text(process.stdin));
    const Provider = require(`uptime-kuma/server/notification-providers/${type.toLowerCase()}`);
    const dialog = readFileSync(require.resolve(`uptime-kuma/src/components/notifications/${type}.vue`), "utf8");
    const options = {};
    for (const [, value, label, argument] of dialog.matchAll(/<option value="(.*?)">{{ \$t\("(.*?)"(?:, \["(.*?)"\])?/g)) {
        options[labels[label].replace("{0}", argument)] = value;
    }
    const notification = {};
    for (const [, label, property] of dialog.matchAll(/<label .*?\$t\(\s*"(.*?)"\s*\).*?\$parent\.notification\.(\w+)/gs)) {
        const value = fields[labels[label]];
        if (value === undefined && OPTIONAL.includes(property)) continue;
        if (value === undefined) throw new Error(`Uptime Kuma also asks for ${labels[label]}`);
        notification[property] = options[value] ?? value;
    }
    console.log(await new Provider().send(notification, said, monitor, heartbeat));
}

main();
