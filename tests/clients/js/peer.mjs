// An encrypting client with matrix-js-sdk's Rust crypto, in strict mode: only cross-signed devices count.
// One command a line on stdin, one answer a line on stdout: {"ok": …} or {"error": "…"}.
// Environment: HOMESERVER (URL), NAME, PASSWORD; STRICT=0 also trusts devices that their owners did not sign;
// SIGNED=0 leaves its own device unsigned.

import { webcrypto } from "node:crypto";
import { createInterface } from "node:readline";
import { ClientEvent, createClient, SyncState } from "matrix-js-sdk";
import {
    AllDevicesIsolationMode,
    decodeRecoveryKey,
    OnlySignedDevicesIsolationMode,
    VerificationPhase,
} from "matrix-js-sdk/lib/crypto-api/index.js";
import { OlmMachine } from "@matrix-org/matrix-sdk-crypto-wasm";
import { logger } from "matrix-js-sdk/lib/logger.js";

logger.setLevel("silent", false);
const write = process.stdout.write.bind(process.stdout); // stdout is for answers alone
for (const level of ["log", "info", "debug", "warn", "error"]) console[level] = () => {};

const { HOMESERVER, NAME, PASSWORD, STRICT, SIGNED } = process.env;
const session = await createClient({ baseUrl: HOMESERVER }).loginRequest({
    type: "m.login.password",
    identifier: { type: "m.id.user", user: NAME },
    password: PASSWORD,
});
const client = createClient({
    baseUrl: HOMESERVER,
    accessToken: session.access_token,
    userId: session.user_id,
    deviceId: session.device_id,
    cryptoCallbacks: {
        getSecretStorageKey: async ({ keys }) => {
            const id = Object.keys(keys)[0];
            return storageKey ? [id, storageKey] : null;
        },
        cacheSecretStorageKey: () => {},
    },
});
let storageKey = null;
let verifying = null; // the verification that was begun last
await client.initRustCrypto({ useIndexedDB: false });
const crypto = client.getCrypto();
crypto.setDeviceIsolationMode(STRICT === "0" ? new AllDevicesIsolationMode(false) : new OnlySignedDevicesIsolationMode());

const known = new Map(); // event id → event
client.on(ClientEvent.Event, (event) => event.getId() && known.set(event.getId(), event));
const prepared = new Promise((resolve, reject) => {
    client.on(ClientEvent.Sync, (state, _, data) => {
        if (state === SyncState.Prepared) resolve();
        if (state === SyncState.Error) reject(data?.error);
    });
});
await client.startClient({ initialSyncLimit: 100, pollTimeout: 5000 });
await prepared;
if (SIGNED !== "0") {
    await crypto.bootstrapCrossSigning({
        authUploadDeviceSigningKeys: (upload) =>
            upload({
                type: "m.login.password",
                identifier: { type: "m.id.user", user: session.user_id },
                password: PASSWORD,
            }),
    });
}

const published = async () => (await client.downloadKeysForUsers([session.user_id])).device_keys?.[session.user_id];
while (!(await published())?.[session.device_id]) await new Promise((resolve) => setTimeout(resolve, 50));

const token = { Authorization: `Bearer ${session.access_token}` };
const seconds = (n) => new Promise((resolve) => setTimeout(resolve, n * 1000));

/** An event once it is decrypted; after `patience` seconds, as it is. A key may come late, and so may a signature. */
async function read({ event_id: id, patience }) {
    const until = Date.now() + patience * 1000;
    while (Date.now() < until) {
        const event = known.get(id);
        const isRead = event && !event.isBeingDecrypted() && !event.isDecryptionFailure();
        if (isRead && event.getType() !== "m.room.encrypted") return described(event);
        // The SDK tries again when a key comes, but not when the sender's signature does: as a client that is reopened.
        if (event?.isDecryptionFailure()) await event.attemptDecryption(crypto, { isRetry: true });
        await seconds(0.05);
    }
    const event = known.get(id);
    return event ? described(event) : { missing: true };
}

async function described(event) {
    const shield = event.isEncrypted() && !event.isDecryptionFailure() ? await crypto.getEncryptionInfoForEvent(event) : null;
    return {
        type: event.getType(),
        content: event.getOriginalContent(), // not that of an edit
        relation: event.getWireContent()["m.relates_to"] ?? null,
        sender: event.getSender(),
        encrypted: event.isEncrypted(),
        session: event.getWireContent().session_id ?? null,
        failure: event.isDecryptionFailure() ? event.decryptionFailureReason : null,
        shield: shield && shield.shieldColour,
        reason: shield && shield.shieldReason,
    };
}

const commands = {
    async whoami() {
        const keys = await crypto.getOwnDeviceKeys();
        return { user_id: session.user_id, device_id: session.device_id, access_token: session.access_token, ...keys };
    },
    async join({ room }) {
        await client.joinRoom(room);
        while (client.getRoom(room)?.getMyMembership() !== "join") await seconds(0.05);
        return {};
    },
    async leave({ room }) {
        await client.leave(room);
        return {};
    },
    async send({ room, content, type }) {
        while (!client.isRoomEncrypted(room)) await seconds(0.05);
        return await client.sendEvent(room, type ?? "m.room.message", content);
    },
    read,
    async discard({ room }) {
        await crypto.forceDiscardSession(room);
        return {};
    },
    async trust({ user_id: user, device_id: device }) {
        const status = await crypto.getDeviceVerificationStatus(user, device);
        return { signed: status?.signedByOwner ?? null, verified: status?.isVerified() ?? null };
    },
    async identity({ user_id: user }) {
        await crypto.userHasCrossSigningKeys(user, true);
        const status = await crypto.getUserVerificationStatus(user);
        return { known: await crypto.userHasCrossSigningKeys(user), verified: status.isCrossSigningVerified() };
    },
    async storage({ passphrase }) {
        let made;
        await crypto.bootstrapSecretStorage({
            setupNewSecretStorage: true,
            setupNewKeyBackup: true,
            createSecretStorageKey: async () => {
                made = await crypto.createRecoveryKeyFromPassphrase(passphrase || undefined);
                storageKey = made.privateKey;
                return made;
            },
        });
        return { recovery_key: made.encodedPrivateKey };
    },
    async recover({ recovery_key: text }) {
        storageKey = decodeRecoveryKey(text);
        await crypto.userHasCrossSigningKeys(session.user_id, true); // asks for the public keys, which it compares
        await crypto.bootstrapCrossSigning({});
        const keys = await crypto.getCrossSigningStatus();
        return { private: keys.privateKeysCachedLocally, in_storage: keys.privateKeysInSecretStorage };
    },
    /** A file of an event as it was before it was encrypted, in Base64, with what the homeserver says of it. */
    async file({ file }) {
        const [, server, id] = file.url.match(/^mxc:\/\/([^/]+)\/(.+)$/);
        const answer = await fetch(`${HOMESERVER}/_matrix/client/v1/media/download/${server}/${id}`, { headers: token });
        const data = new Uint8Array(await answer.arrayBuffer());
        const sha256 = Buffer.from(await webcrypto.subtle.digest("SHA-256", data)).toString("base64").replace(/=+$/, "");
        if (sha256 !== file.hashes.sha256) throw new Error("the hash is another one");
        const key = await webcrypto.subtle.importKey("jwk", file.key, "AES-CTR", false, ["decrypt"]);
        const counter = Buffer.from(file.iv, "base64");
        const plain = await webcrypto.subtle.decrypt({ name: "AES-CTR", counter, length: 64 }, key, data);
        const head = (name) => answer.headers.get(name);
        return {
            data: Buffer.from(plain).toString("base64"),
            type: head("content-type"),
            disposition: head("content-disposition"),
        };
    },
    /** Send an encrypted file as clients do; `broken`: with a hash that is not its own. */
    async attach({ room, data, content, broken }) {
        const key = await webcrypto.subtle.generateKey({ name: "AES-CTR", length: 256 }, true, ["encrypt", "decrypt"]);
        const counter = new Uint8Array(16);
        webcrypto.getRandomValues(counter.subarray(0, 8));
        const plain = Buffer.from(data, "base64");
        const encrypted = await webcrypto.subtle.encrypt({ name: "AES-CTR", counter, length: 64 }, key, plain);
        const { content_uri: url } = await client.uploadContent(new Blob([encrypted]), { includeFilename: false });
        const hash = await webcrypto.subtle.digest("SHA-256", broken ? plain : encrypted);
        const text = (bytes) => Buffer.from(bytes).toString("base64").replace(/=+$/, "");
        const file = {
            url,
            v: "v2",
            key: await webcrypto.subtle.exportKey("jwk", key),
            iv: text(counter),
            hashes: { sha256: text(hash) },
        };
        return { ...(await this.send({ room, content: { ...content, file } })), file };
    },
    async begin({ user_id: user, device_id: device }) {
        await crypto.userHasCrossSigningKeys(user, true);
        const request = await crypto.requestDeviceVerification(user, device);
        verifying = { request, error: null };
        return {};
    },
    /** The emoji, as this client shows them: [symbol, name] each. */
    async compare() {
        const { request } = verifying;
        while (request.phase === VerificationPhase.Requested) await seconds(0.05);
        if (request.phase === VerificationPhase.Cancelled) return { cancelled: request.cancellationCode };
        verifying.verifier = await request.startVerification("m.sas.v1");
        verifying.outcome = verifying.verifier.verify().then(
            () => ({ verified: true }),
            (error) => ({ cancelled: request.cancellationCode ?? String(error) }),
        );
        while (!verifying.verifier.getShowSasCallbacks()) {
            if (request.phase === VerificationPhase.Cancelled) return { cancelled: request.cancellationCode };
            await seconds(0.05);
        }
        return { emoji: verifying.verifier.getShowSasCallbacks().sas.emoji };
    },
    /** `how`: confirm, mismatch or cancel. */
    async decide({ how }) {
        const shown = verifying.verifier.getShowSasCallbacks();
        await shown[how]();
        return how === "confirm" ? await verifying.outcome : {};
    },
    async outcome() {
        return await verifying.outcome;
    },
    async exported() {
        return JSON.parse(await crypto.exportRoomKeysAsJson());
    },
    /** As a client's user does it: by a file's text, under a passphrase. */
    async exported_file({ passphrase }) {
        return { text: OlmMachine.encryptExportedRoomKeys(await crypto.exportRoomKeysAsJson(), passphrase, 100_000) };
    },
    async imported_file({ text, passphrase }) {
        await crypto.importRoomKeysAsJson(OlmMachine.decryptExportedRoomKeys(text, passphrase));
        return {};
    },
    async imported({ keys }) {
        await crypto.importRoomKeysAsJson(JSON.stringify(keys));
        return {};
    },
};

write(`${JSON.stringify({ ok: await commands.whoami() })}\n`);
for await (const line of createInterface({ input: process.stdin })) {
    const { do: name, ...rest } = JSON.parse(line);
    let answer;
    try {
        answer = { ok: await commands[name](rest) };
    } catch (error) {
        answer = { error: String(error?.message ?? error) };
    }
    write(`${JSON.stringify(answer)}\n`);
}
process.exit(0); // the SDK has timers that would go on
