// Uptime Kuma's Matrix notification says a text. On stdin, as JSON: `fields`, by the labels of its dialog, and `text`.

const { readFileSync } = require("node:fs");
const { text } = require("node:stream/consumers");
const Matrix = require("uptime-kuma/server/notification-providers/matrix");
const labels = require("uptime-kuma/src/lang/en.json");

const DIALOG = readFileSync(require.resolve("uptime-kuma/src/components/notifications/Matrix.vue"), "utf8");

async function main() {
    const { fields, text: said } = JSON.parse(await text(process.stdin));
    const notification = {};
    for (const [, label, property] of DIALOG.matchAll(/<label .*?\$t\("(.*?)"\).*?\$parent\.notification\.(\w+)/gs)) {
        if (!(labels[label] in fields)) throw new Error(`Uptime Kuma also asks for ${labels[label]}`);
        notification[property] = fields[labels[label]];
    }
    console.log(await new Matrix().send(notification, said));
}

main();
