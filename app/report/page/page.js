"use strict";
// Ordinary text of a figure has no colour of its own: it takes the page's, and follows it.
const ink = () => getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();
const plots = [...document.querySelectorAll(".plot")];

// The library is in the page, compressed: it runs as an inline script, which is all that the page's policy allows.
const draw = async () => {
  const packed = atob(document.getElementById("plotly").textContent);
  const stream = new Blob([Uint8Array.from(packed, char => char.charCodeAt(0))]).stream();
  const script = document.createElement("script");
  script.textContent = await new Response(stream.pipeThrough(new DecompressionStream("gzip"))).text();
  document.head.append(script);
  for (const plot of plots) {
    const { data, layout } = JSON.parse(plot.nextElementSibling.textContent);
    layout.font = { ...layout.font, color: ink(), family: "system-ui, sans-serif" };
    Plotly.newPlot(plot, data, layout, { responsive: true, displaylogo: false });
  }
};
if (plots.length) draw();

const paint = color => window.Plotly && plots.forEach(plot => Plotly.relayout(plot, { "font.color": color }));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => paint(ink()));
addEventListener("beforeprint", () => paint("#000"));
addEventListener("afterprint", () => paint(ink()));
document.getElementById("save")?.addEventListener("click", () => {
  const blob = new Blob([document.getElementById("data").textContent], { type: "application/json" });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = "numbers.json";
  link.click();
  URL.revokeObjectURL(link.href);
});
