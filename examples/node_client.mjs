// A client for Node.js without any package, written from docs/protocol.md alone. It guards a mail server that fails
// three times, and shares the breaker "mail" with every other client of that Redis.
//
//   make bundles && REDIS_URL=redis://127.0.0.1:6379 node examples/node_client.mjs

import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { createConnection } from "node:net";
import { hostname } from "node:os";
import { fileURLToPath } from "node:url";

export class ReplyError extends Error {}

// One connection to Redis, at HOST:PORT or at the path of a Unix socket.
export class Connection {
  #socket;
  #waiting = [];
  #received = Buffer.alloc(0);
  onPush = () => {};

  constructor(address) {
    const [, host, port] = /^(.*):(\d+)$/.exec(address) ?? [];
    this.#socket = createConnection(port ? { host, port: Number(port) } : { path: address });
    this.#socket.on("data", (chunk) => this.#receive(chunk));
    this.#socket.on("error", (error) => this.#waiting.splice(0).forEach((one) => one.reject(error)));
  }

  // The reply to one command. An error reply is thrown.
  send(...words) {
    const parts = words.map((word) => Buffer.from(String(word)));
    const head = Buffer.from(`*${parts.length}\r\n`);
    const body = parts.flatMap((part) => [Buffer.from(`$${part.length}\r\n`), part, Buffer.from("\r\n")]);
    this.#socket.write(Buffer.concat([head, ...body]));
    return new Promise((resolve, reject) => this.#waiting.push({ resolve, reject }));
  }

  close() {
    this.#socket.destroy();
  }

  #receive(chunk) {
    this.#received = Buffer.concat([this.#received, chunk]);
    let found;
    while ((found = parse(this.#received, 0))) {
      this.#received = this.#received.subarray(found.end);
      const next = this.#waiting.shift();
      if (!next) this.onPush(found.value);
      else if (found.value instanceof ReplyError) next.reject(found.value);
      else next.resolve(found.value);
    }
  }
}

// The value that begins at a position, and where it ends; null if it has not arrived completely.
function parse(bytes, start) {
  const eol = bytes.indexOf("\r\n", start);
  if (eol < 0) return null;
  const line = bytes.toString("utf8", start + 1, eol);
  const size = Number(line);
  let end = eol + 2;
  switch (bytes.toString("utf8", start, start + 1)) {
    case "+":
      return { value: line, end };
    case "-":
      return { value: new ReplyError(line), end };
    case ":":
      return { value: size, end };
    case "$":
      if (size < 0) return { value: null, end };
      return bytes.length < end + size + 2 ? null : { value: bytes.toString("utf8", end, end + size), end: end + size + 2 };
  }
  const value = [];
  for (let count = 0; count < size; count++) {
    const item = parse(bytes, end);
    if (!item) return null;
    value.push(item.value);
    end = item.end;
  }
  return { value, end };
}

// The keys of a breaker.
export function keysOf(name, prefix = "circuit_breaker") {
  const state = `${prefix}:${name}:state`;
  return { state, history: `{${state}}:history`, policy: `{${state}}:policy` };
}

export class CircuitOpenError extends Error {
  constructor(name, reply) {
    super(`the circuit of ${name} is ${reply.state}`);
    this.retryAfterMs = reply.retry_after_ms;
  }
}

// A breaker that asks Redis before each call and reports after it. scripts: the folder with the four scripts.
export class Breaker {
  constructor(connection, name, policy, scripts) {
    this.connection = connection;
    this.name = name;
    this.keys = Object.values(keysOf(name));
    this.common = { policy, instance: `${hostname()}:${process.pid}` };
    this.scripts = scripts;
  }

  async run(script, request) {
    const text = readFileSync(`${this.scripts}/${script}.lua`);
    const rest = [3, ...this.keys, JSON.stringify({ ...this.common, ...request })];
    const sha1 = createHash("sha1").update(text).digest("hex");
    try {
      return JSON.parse(await this.connection.send("EVALSHA", sha1, ...rest));
    } catch (error) {
      if (!error.message.startsWith("NOSCRIPT")) throw error;
      return JSON.parse(await this.connection.send("EVAL", text, ...rest));
    }
  }

  async call(guarded) {
    const permit = await this.run("acquire", {});
    if (!permit.admitted) throw new CircuitOpenError(this.name, permit);
    const { generation, probe } = permit;
    let result;
    try {
      result = await guarded();
    } catch (error) {
      const text = `${error.name}: ${error.message}`.replace(/[^ -~]/g, "?").slice(0, 200);
      await this.run("record", { generation, probe, failures: 1, error: text });
      throw error;
    }
    await this.run("record", { generation, probe, successes: 1 });
    return result;
  }
}

async function main() {
  const url = new URL(process.env.REDIS_URL ?? "redis://127.0.0.1:6379");
  const connection = new Connection(url.protocol === "unix:" ? url.pathname : `${url.hostname}:${url.port || 6379}`);
  const scripts = process.env.SCRIPTS ?? fileURLToPath(new URL("../build/lua", import.meta.url));
  const breaker = new Breaker(connection, "mail", { failure_threshold: 3, reset_timeout_ms: 500 }, scripts);
  const mail = (number) => {
    if (number <= 3) throw new Error("the mail server is down");
    return `sent mail ${number}`;
  };
  for (let number = 1; number <= 6; number++) {
    try {
      console.log(await breaker.call(() => mail(number)));
    } catch (error) {
      if (!(error instanceof CircuitOpenError)) {
        console.log(`failed: ${error.message}`);
        continue;
      }
      console.log(`rejected: ${error.message}`);
      await new Promise((resolve) => setTimeout(resolve, error.retryAfterMs + 1));
    }
  }
  const { state, health } = await breaker.run("snapshot", {});
  console.log(`the circuit is ${state}, its health ${health}`);
  connection.close();
}

if (process.argv[1] === fileURLToPath(import.meta.url)) await main();
