// A visitor with matrix-js-sdk: logs in, joins, talks, uploads, reads back. What it saw is the last line, as JSON.
// Environment: BRIDGE (URL), NAME and PASSWORD (of the visitor), ROOM (an id or an alias), FILE (a path).

import { readFile } from "node:fs/promises";
import { createClient, ClientEvent, SyncState } from "matrix-js-sdk";

const { BRIDGE, NAME, PASSWORD, ROOM, FILE } = process.env;

const session = await createClient({ baseUrl: BRIDGE }).loginRequest({
    type: "m.login.password",
    identifier: { type: "m.id.user", user: NAME },
    password: PASSWORD,
});
const client = createClient({
    baseUrl: BRIDGE,
    accessToken: session.access_token,
    userId: session.user_id,
    deviceId: session.device_id,
});

const { roomId } = await client.joinRoom(ROOM);

// From here on the sync loop runs: what is said below is seen there.
const arrived = [];
const allArrived = new Promise((resolve) => {
    client.on(ClientEvent.Event, (event) => {
        if (event.getRoomId() !== roomId || event.getType() !== "m.room.message") return;
        arrived.push(event.getContent().body);
        if (arrived.length === 3) resolve();
    });
});
const prepared = new Promise((resolve, reject) => {
    client.on(ClientEvent.Sync, (state, _, data) => {
        if (state === SyncState.Prepared) resolve();
        if (state === SyncState.Error) reject(data?.error);
    });
});
await client.startClient({ initialSyncLimit: 10 });
await prepared;

const bytes = await readFile(FILE);
const { content_uri: uri } = await client.uploadContent(bytes, { type: "image/png", name: "red.png" });
await client.sendTextMessage(roomId, "one");
await client.sendTextMessage(roomId, "two");
await client.sendMessage(roomId, { msgtype: "m.image", body: "red.png", url: uri, info: { mimetype: "image/png" } });
await allArrived;

const url = client.mxcUrlToHttp(uri, undefined, undefined, undefined, false, true, true);
const back = await fetch(url, { headers: { Authorization: `Bearer ${client.getAccessToken()}` } });
const page = await client.createMessagesRequest(roomId, null, 3, "b");
const create = await client.getStateEvent(roomId, "m.room.create", ""); // asks for …/state/m.room.create/
const members = await client.getJoinedRoomMembers(roomId);

const seen = {
    room: roomId,
    well_known: session.well_known?.["m.homeserver"]?.base_url ?? null,
    arrived,
    history: page.chunk.map((event) => event.content.body),
    members: Object.keys(members.joined),
    created_in_version: create.room_version ?? null,
    file_is_the_same: Buffer.from(await back.arrayBuffer()).equals(bytes),
    file_type: back.headers.get("content-type"),
};
client.stopClient();
await client.logout();
process.stdout.write(`${JSON.stringify(seen)}\n`, () => process.exit(0)); // the SDK has timers that would go on
