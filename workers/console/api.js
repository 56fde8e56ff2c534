// The HTTP API as the console uses it: one way to call, one way to follow, the key or its ticket sent with both.
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

// Follows a user's updates until `signal` says stop. EventSource sends no header: a ticket stands for the key, and the
// call for it tells why, where the stream cannot be had.
// on.event(name, data), on.state("open" | "lost" | Refused)
export async function follow(userId, on, signal) {
  const user = encodeURIComponent(userId);
  let pause = 500;
  const opened = () => { pause = 500; on.state("open"); };
  while (!signal.aborted) {
    try {
      const { ticket } = await call(`/v1/stream/tickets?user=${user}`, "POST");
      await listen(`/v1/stream?user=${user}&ticket=${ticket}`, { ...on, opened }, signal);
    } catch (error) {
      if (!signal.aborted) on.state(error instanceof Refused ? error : "lost");
    }
    if (!signal.aborted) await wait(pause * (0.75 + Math.random() / 2)); // not all tabs at once
    pause = Math.min(pause * 2, 8000);
  }
}

// Ends when EventSource does not reconnect by itself (the ticket has run out), hears nothing, or is told to.
function listen(url, on, signal) {
  if (signal.aborted) return null;
  return new Promise(ended => {
    const source = new EventSource(url);
    let watchdog = 0;
    const end = () => { clearTimeout(watchdog); source.close(); ended(); };
    const lost = () => { on.state("lost"); end(); };
    const heard = () => { clearTimeout(watchdog); watchdog = setTimeout(lost, SILENCE_MS); };
    heard();
    source.onopen = () => { heard(); on.opened(); };
    source.onerror = () => (source.readyState === EventSource.CLOSED ? lost() : on.state("lost"));
    for (const name of ["status", "recommendations"]) {
      source.addEventListener(name, ({ data }) => { heard(); on.event(name, JSON.parse(data)); });
    }
    signal.addEventListener("abort", end, { once: true });
  });
}
