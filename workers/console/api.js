// The HTTP API as the console uses it: one way to call, one way to follow, the key sent with both.
const KEY = "upwell.key";
const SILENCE_MS = 40_000; // the server says something every 15 s

export class Refused extends Error {
  constructor(status, detail, retryAfterS) {
    super(detail);
    this.status = status;
    this.retryAfterS = retryAfterS;
  }
  get wantsKey() { return this.status === 401 || this.status === 403; }
}

export const storedKey = () => sessionStorage.getItem(KEY) ?? "";
export const storeKey = key => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY));
export const wait = ms => new Promise(done => setTimeout(done, ms));

async function request(path, options = {}) {
  const headers = { ...options.headers, ...(storedKey() && { Authorization: `Bearer ${storedKey()}` }) };
  const answer = await fetch(path, { ...options, headers });
  if (answer.ok) return answer;
  const detail = await answer.json().then(body => body.detail, () => null);
  throw new Refused(answer.status, detail ?? answer.statusText, Number(answer.headers.get("Retry-After")) || 1);
}

export async function call(path, method = "GET", body = undefined) {
  const content = body === undefined ? {} : { body: JSON.stringify(body), headers: { "Content-Type": "application/json" } };
  const answer = await request(path, { method, ...content });
  return answer.status === 204 ? null : answer.json();
}

// Sends one event until Kafka has it: its event_id makes sending it again harmless. Throws after `tries`.
export async function sendEvent(event, onRetry, tries = 5) {
  for (let left = tries; ; left--) {
    try {
      return (await call("/v1/events", "POST", event)).results?.[0] ?? null;
    } catch (error) {
      if (left <= 1 || (error instanceof Refused && error.status !== 503 && error.status !== 429)) throw error;
      onRetry(error);
      await wait(1000 * (error.retryAfterS ?? 1));
    }
  }
}

// Follows a user's updates until `signal` says stop, reconnecting by itself. EventSource cannot send a key.
// on.event(name, data), on.state("open" | "lost" | Refused)
export async function follow(userId, on, signal) {
  let pause = 500, lastId = null;
  while (!signal.aborted) {
    const silent = new AbortController();
    let watchdog = 0;
    const heard = () => { clearTimeout(watchdog); watchdog = setTimeout(() => silent.abort(), SILENCE_MS); };
    try {
      heard();
      const answer = await request(`/v1/stream?user=${encodeURIComponent(userId)}`, {
        headers: { Accept: "text/event-stream", ...(lastId && { "Last-Event-ID": lastId }) },
        signal: AbortSignal.any([signal, silent.signal]),
        cache: "no-store",
      });
      on.state("open");
      pause = 500;
      for await (const { name, data, id } of events(answer.body, heard)) {
        lastId = id ?? lastId;
        on.event(name, data);
      }
      on.state("lost");
    } catch (error) {
      if (!signal.aborted) on.state(error instanceof Refused ? error : "lost");
    } finally {
      clearTimeout(watchdog);
    }
    if (!signal.aborted) await wait(pause * (0.75 + Math.random() / 2)); // not all tabs at once
    pause = Math.min(pause * 2, 8000);
  }
}

async function* events(body, heard) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    heard();
    const blocks = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const found = { event: "message", data: [], id: null };
      for (const line of block.split("\n")) {
        const [, field, text] = /^(event|data|id): ?(.*)$/.exec(line) ?? [];
        if (field === "data") found.data.push(text);
        else if (field) found[field] = text;
      }
      if (found.data.length) yield { name: found.event, data: JSON.parse(found.data.join("\n")), id: found.id };
    }
  }
}
