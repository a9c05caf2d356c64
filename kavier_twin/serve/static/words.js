/* Numbers, units and names as a reader wants them. */

const KPI = {
  ttft_seconds: "time to first token", itl_seconds: "inter-token latency", tpot_seconds: "time per output token",
  e2e_seconds: "end-to-end latency", queue_seconds: "queue time", prefix_cache_hit_ratio: "prefix-cache hit ratio",
  kv_cache_usage_ratio: "KV cache usage", requests_running: "requests running", requests_waiting: "requests waiting",
  preemptions: "preemptions", requests_rejected: "requests rejected", requests_per_second: "requests/s",
  output_tokens_per_second: "output tokens/s", power_watts: "power, W",
};

export function kpiName(kpi, statistic = "") {
  return (KPI[kpi] || kpi.replaceAll("_", " ")) + (statistic ? `, ${statistic}` : "");
}

export function known(value) {
  return value !== null && value !== undefined && Number.isFinite(value);
}

/* A value of a KPI in the unit its name ends with. */
export function figure(value, kpi) {
  if (!known(value)) return "–";
  if (kpi.endsWith("_ratio")) return `${(100 * value).toFixed(1)} %`;
  if (kpi.endsWith("_seconds")) {
    if (value >= 10) return `${value.toFixed(1)} s`;
    if (value >= 1) return `${value.toFixed(2)} s`;
    return `${(1000 * value).toFixed(value < 0.01 ? 1 : 0)} ms`;
  }
  if (kpi.startsWith("cost")) return value.toFixed(3);
  return Math.abs(value) >= 100 ? value.toFixed(0) : value.toFixed(1).replace(/\.0$/, "");
}

/* An error: relative, but for ratios a difference. */
export function errorOf(value, kpi) {
  if (!known(value)) return "–";
  const sign = value > 0 ? "+" : value < 0 ? "−" : "±", size = Math.abs(value);
  return `${sign}${(100 * size).toFixed(1)} ${kpi.endsWith("_ratio") ? "points" : "%"}`;
}

export function percent(share) {
  return known(share) ? `${Math.round(100 * share)} %` : "–";
}

export function span(seconds) {
  if (seconds >= 3600 && seconds % 3600 === 0) return `${seconds / 3600} h`;
  if (seconds >= 120 || seconds === 60) return `${+(seconds / 60).toFixed(1)} min`;
  return `${+Number(seconds).toFixed(1)} s`;
}

/* The same on an axis. */
export function minute(seconds) {
  return seconds > 1e9 ? new Date(1000 * seconds).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" }) : clock(seconds);
}

/* The stream's time: a clock's where it is unix time, else minutes and seconds of the recording. */
export function clock(seconds) {
  if (!known(seconds)) return "–";
  if (seconds > 1e9) return new Date(1000 * seconds).toLocaleTimeString();
  const whole = Math.max(0, Math.floor(seconds));
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}
