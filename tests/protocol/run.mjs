// Runs the conformance vectors without Python: node tests/protocol/run.mjs ADDRESS [FOLDER OF THE SCRIPTS]
// ADDRESS is HOST:PORT or the path of a Unix socket. The runner empties the database of that server.

import assert from "node:assert/strict";
import { readFileSync, readdirSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { Connection, ReplyError, keysOf } from "../../examples/node_client.mjs";

const SLACK_MS = 60_000; // by which a time to live may have run down meanwhile
const here = (path) => fileURLToPath(new URL(path, import.meta.url));
const [address, scripts = here("../../build/lua")] = process.argv.slice(2);
const asText = (value) => (typeof value === "string" ? value : JSON.stringify(value));
const clock = readFileSync(here("../lua/frozen_clock.lua"), "utf8");
const keys = keysOf("vector");

function onFrozenClock(script) {
  const text = readFileSync(`${scripts}/${script}.lua`, "utf8");
  const cut = text.lastIndexOf("--[[");
  return text.slice(0, cut) + clock + text.slice(cut);
}

async function stored(redis, messages, expected) {
  const after = { ttl_ms: {}, messages };
  for (const role of ["state", "policy"]) {
    const text = await redis.send("GET", keys[role]);
    if (text !== null) after[role] = typeof expected[role] === "string" ? text : JSON.parse(text);
  }
  after.history = (await redis.send("XRANGE", keys.history, "-", "+")).map(([, flat]) =>
    Object.fromEntries(flat.flatMap((name, at) => (at % 2 ? [] : [[name, flat[at + 1]]]))),
  );
  for (const [role, key] of Object.entries(keys)) {
    const left = await redis.send("PTTL", key);
    const wanted = expected.ttl_ms?.[role] ?? 0;
    if (left >= 0) after.ttl_ms[role] = wanted - SLACK_MS < left && left <= wanted ? wanted : left;
  }
  return Object.fromEntries(Object.entries(after).filter(([, value]) => Object.keys(value).length > 0));
}

async function run(redis, subscriber, { script, before, now_ms, request, reply, refused, after }) {
  const messages = [];
  await redis.send("FLUSHDB");
  await redis.send("SET", "test:now_ms", now_ms);
  for (const [role, value] of Object.entries(before)) await redis.send("SET", keys[role], asText(value));
  const end = new Promise((resolve) => {
    subscriber.onPush = ([, , text]) => (text === "end" ? resolve() : messages.push(JSON.parse(text)));
  });
  try {
    const text = await redis.send("EVAL", onFrozenClock(script), 3, ...Object.values(keys), asText(request));
    assert.deepEqual(JSON.parse(text), reply);
  } catch (error) {
    if (!(error instanceof ReplyError)) throw error;
    assert.equal(error.message, refused);
  }
  await redis.send("PUBLISH", keys.state, "end");
  await end;
  assert.deepEqual(await stored(redis, messages, after), after);
}

const redis = new Connection(address);
const subscriber = new Connection(address);
await subscriber.send("SUBSCRIBE", keys.state);
let failed = 0;
let total = 0;
for (const file of readdirSync(here(".")).filter((name) => name.endsWith(".json"))) {
  for (const vector of JSON.parse(readFileSync(here(file), "utf8"))) {
    total++;
    try {
      await run(redis, subscriber, vector);
    } catch (error) {
      failed++;
      console.log(`${file}: ${vector.name}: ${error.message}`);
    }
  }
}
console.log(`${total - failed} of ${total} vectors passed`);
redis.close();
subscriber.close();
process.exitCode = failed ? 1 : 0;
