// n8n's own engine runs a workflow with n8n's own nodes, as an editor's "Execute workflow" does. On stdin, as JSON:
// `workflow`, as one pastes it into the editor, and `credential`, its fields by the labels that n8n shows.
// Prints what the workflow's last node returned, as one line of JSON. Environment: N8N_USER_FOLDER, for its files.

import "reflect-metadata"; // which n8n expects to be there first
import { createRequire } from "node:module";
import { text } from "node:stream/consumers";

const require = createRequire(import.meta.url);
const { ExecutionLifecycleHooks, WorkflowExecute } = require("n8n-core");
const { ICredentialsHelper, Workflow } = require("n8n-workflow");
const { MatrixApi } = require("n8n-nodes-base/dist/credentials/MatrixApi.credentials.js");

const { workflow: pasted, credential } = JSON.parse(await text(process.stdin));

const secrets = {};
for (const { displayName, name } of new MatrixApi().properties) {
    if (!(displayName in credential)) throw new Error(`n8n also asks for ${displayName}`);
    secrets[name] = credential[displayName];
}

class Credentials extends ICredentialsHelper {
    getParentTypes = () => [];
    isCredentialUsableByNode = () => true;
    getDecrypted = async () => secrets;
}

function load(type) {
    const [, name] = type.split("."); // n8n-nodes-base.matrix
    const exported = name[0].toUpperCase() + name.slice(1);
    return new (require(`n8n-nodes-base/dist/nodes/${exported}/${exported}.node.js`)[exported])();
}

const workflow = new Workflow({
    id: "1",
    nodes: pasted.nodes,
    connections: pasted.connections,
    active: false,
    nodeTypes: { getByName: load, getByNameAndVersion: load, getKnownTypes: () => ({}) },
});
const nowhere = "http://localhost"; // where n8n would wait for webhooks and forms
const { data } = await new WorkflowExecute(
    {
        credentialsHelper: new Credentials(),
        hooks: new ExecutionLifecycleHooks("manual", "1", pasted),
        variables: {},
        currentNodeExecutionIndex: 0,
        webhookWaitingBaseUrl: nowhere,
        formWaitingBaseUrl: nowhere,
    },
    "manual",
).run({ workflow });
const { error, lastNodeExecuted, runData } = data.resultData;
if (error) throw error;
const [items] = runData[lastNodeExecuted][0].data.main;
process.stdout.write(`${JSON.stringify(items.map(({ json }) => json))}\n`, () => process.exit(0));
