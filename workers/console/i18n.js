// English and Chinese. An element says which text it holds: data-t, and data-t-LABEL for an attribute.
const TEXTS = {
  tagline: ["what one click changes", "一次点击带来的变化"],
  skip: ["Skip to recommendations", "跳到推荐列表"],
  live: ["Live", "实时"],
  connecting: ["Connecting …", "正在连接 …"],
  reconnecting: ["Reconnecting … list as of {time}", "正在重新连接 … 列表截至 {time}"],
  broker: ["Kafka is away: lists stay as of {time}", "Kafka 不可用：列表停留在 {time}"],
  starting: ["Starting: {why}", "正在启动：{why}"],
  locked: ["An API key is needed", "需要 API 密钥"],
  failed: ["Not answered: {why}", "请求失败：{why}"],
  generation: ["Generation", "代次"],
  swaps: ["swaps: {n} · items: {items}", "切换 {n} 次 · {items} 个物品"],
  since: ["since {time}", "始于 {time}"],
  language: ["中文", "English"],
  theme: ["Light or dark", "浅色或深色"],
  key: ["API key", "API 密钥"],
  keyHelp: [
    "Kept in this tab until it is closed, sent only to this server. It needs the scopes read and ingest; admin for the clicks behind a list and for forgetting.",
    "仅保存在此标签页中，关闭即清除，只发送给本服务器。需要 read 和 ingest 权限；查看点击依据和遗忘用户需要 admin 权限。",
  ],
  save: ["Use this key", "使用此密钥"],
  cancel: ["Cancel", "取消"],
  people: ["People", "用户"],
  you: ["You", "你"],
  youAre: ["only your own clicks", "只有你自己的点击"],
  fan: ["Likes {name}", "喜欢 {name}"],
  drifter: ["Clicks on anything", "随意点击"],
  watched: ["watched", "正在查看"],
  play: ["Let {name} click", "让“{name}”点击"],
  pause: ["Stop {name}", "停止“{name}”"],
  otherUser: ["Another user id", "其他用户 ID"],
  watch: ["Watch", "查看"],
  catalogue: ["Items", "物品"],
  search: ["Search items", "搜索物品"],
  sendAs: ["Send as", "发送为"],
  noItems: ["No item matches.", "没有匹配的物品。"],
  emptyCatalogue: ["No items yet. Send some to /v1/items.", "还没有物品。请发送到 /v1/items。"],
  unavailable: ["not available", "不可用"],
  ranked: ["Recommended now", "当前推荐"],
  personal: ["personal", "个性化"],
  session: ["this session", "本次会话"],
  popular: ["popular", "热门"],
  coldStart: ["Cold start: no clicks yet, so this is what is popular. Click an item.", "冷启动：还没有点击，因此显示热门物品。请点击一个物品。"],
  fallback: ["Fallback: {why}", "降级：{why}"],
  stale: ["Stale: newer clicks are not in this list yet.", "列表已过期：较新的点击尚未计入。"],
  asOf: ["as of partition {partition}, offset {offset}", "截至分区 {partition}，偏移量 {offset}"],
  arm: ["arm {arm}", "实验组 {arm}"],
  nothing: ["Nothing to recommend: every item has been seen, or none is known.", "没有可推荐的物品：都已看过，或目录为空。"],
  because: ["because of {reasons}", "因为 {reasons}"],
  explained: ["of the {share} that can be explained", "（占可解释部分 {share}）"],
  partial: [
    "A score is explained as far as it is a sum over the clicks; the shares are of that part.",
    "得分中可表示为各次点击之和的部分才可解释；百分比针对该部分。",
  ],
  isNew: ["new", "新"],
  up: ["up {n}", "上升 {n}"],
  down: ["down {n}", "下降 {n}"],
  path: ["Path of the last click", "最近一次点击的路径"],
  noPath: ["Click an item to follow it through the service.", "点击一个物品，观察它经过整个服务的路径。"],
  posted: ["Clicked in this browser", "在浏览器中点击"],
  taken: ["Kafka took it", "Kafka 已接收"],
  updated: ["User's state updated", "用户状态已更新"],
  made: ["Vector updated, list made", "向量已更新，列表已生成"],
  published: ["Published to Kafka", "已发布到 Kafka"],
  read: ["Server read the list", "服务器读到列表"],
  pushed: ["Pushed to this browser", "推送到浏览器"],
  shown: ["Shown", "已显示"],
  waiting: ["waiting …", "等待中 …"],
  retrying: ["Kafka does not take it; trying again …", "Kafka 未接收；正在重试 …"],
  late: ["No list after {s} s: the worker is behind or away.", "{s} 秒后仍无列表：处理进程落后或不可用。"],
  refused: ["Refused: {why}", "被拒绝：{why}"],
  place: ["partition {partition}, offset {offset}", "分区 {partition}，偏移量 {offset}"],
  total: ["{ms} ms from click to list", "从点击到列表 {ms} 毫秒"],
  clocks: ["The clocks of browser and server differ: the ways there and back are given as one.", "浏览器与服务器时钟不一致：往返时间合并显示。"],
  network: ["there and back", "往返"],
  history: ["Clicks behind the list", "列表依据的点击"],
  noHistory: ["None yet.", "暂无。"],
  forget: ["Forget me", "忘记我"],
  forgetOther: ["Forget this user", "忘记该用户"],
  forgetAsk: ["Forget {user}?", "忘记 {user}？"],
  forgetHelp: [
    "State, seen items and lists go now; the clicks leave every store with the training window. This cannot be undone.",
    "状态、已看记录和列表立即删除；点击记录随训练窗口从所有存储中清除。此操作无法撤销。",
  ],
  forgotten: ["Forgotten. Receipt {receipt}; gone from every store by {date}.", "已忘记。回执 {receipt}；最迟于 {date} 从所有存储中清除。"],
  forgottenKept: ["Forgotten. Receipt {receipt}; a topic keeps the clicks without end.", "已忘记。回执 {receipt}；有主题无限期保留点击记录。"],
  charts: ["The last minutes", "最近几分钟"],
  latency: ["Click to recommendation, ms", "点击到推荐（毫秒）"],
  rate: ["Events a second", "每秒事件数"],
  hits: ["Live HR@10", "实时 HR@10"],
  p50: ["p50", "p50"],
  p99: ["p99", "p99"],
  events: ["events", "事件"],
  served: ["served", "推荐"],
  popularity: ["popularity", "热门基线"],
  moved: ["List updated. First: {title}", "列表已更新。首位：{title}"],
  "type.view": ["view", "浏览"],
  "type.click": ["click", "点击"],
  "type.like": ["like", "喜欢"],
  "type.cart": ["add to cart", "加入购物车"],
  "type.purchase": ["purchase", "购买"],
  "type.play": ["play", "播放"],
  "type.complete": ["complete", "完成"],
  "type.share": ["share", "分享"],
  "type.skip": ["skip", "跳过"],
  "type.hide": ["hide", "隐藏"],
  "type.dislike": ["dislike", "不喜欢"],
};
const LANGUAGES = ["en", "zh-Hans"];
const KEY = "upwell.language";

const stored = localStorage.getItem(KEY) ?? (navigator.language.startsWith("zh") ? "zh-Hans" : "en");
let at = Math.max(0, LANGUAGES.indexOf(stored));

export function t(key, values = {}) {
  return TEXTS[key][at].replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
}

export const number = (value, digits = 0) =>
  value.toLocaleString(LANGUAGES[at], { minimumFractionDigits: digits, maximumFractionDigits: digits });
export const percent = share => (share > 0 && share < 0.01 ? "< 1 %" : `${number(100 * share)} %`);
export const clock = ms => new Date(ms).toLocaleTimeString(LANGUAGES[at], { hour12: false });

export const day = ms => new Date(ms).toLocaleDateString(LANGUAGES[at], { dateStyle: "medium" });

export function translate(root = document) {
  document.documentElement.lang = LANGUAGES[at];
  for (const element of root.querySelectorAll("[data-t]")) element.textContent = t(element.dataset.t);
  for (const name of ["aria-label", "placeholder", "title"])
    for (const element of root.querySelectorAll(`[data-t-${name}]`))
      element.setAttribute(name, t(element.getAttribute(`data-t-${name}`)));
}

export function nextLanguage() {
  at = (at + 1) % LANGUAGES.length;
  localStorage.setItem(KEY, LANGUAGES[at]);
  translate();
}
