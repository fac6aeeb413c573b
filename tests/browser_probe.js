// What a page is like in a browser, told to the frame around it. See browser.py.
addEventListener("load", () => {
  document.querySelectorAll("details").forEach((d) => (d.open = true));
  const rgba = (words) => {
    const n = (words.match(/[\d.]+/g) || [0, 0, 0, 0]).map(Number);
    return words === "none" || words === "transparent" ? [0, 0, 0, 0] : [n[0], n[1], n[2], n[3] ?? 1];
  };
  const luminance = (c) => {
    const [r, g, b] = c.map((v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [light, dark] = [luminance(a), luminance(b)].sort((x, y) => y - x);
    return (light + 0.05) / (dark + 0.05);
  };
  // The colour that an element puts on what is below it: a shape's fill, a box' background.
  const painted = (e) => {
    const style = getComputedStyle(e);
    if (!(e instanceof SVGElement)) return rgba(style.backgroundColor);
    const fill = rgba(style.fill);
    return [...fill.slice(0, 3), e.ownerSVGElement ? fill[3] * style.fillOpacity * style.opacity : 0];
  };
  const below = (e, x, y) => {
    const found = document.elementsFromPoint(x, y);
    const layers = found.slice(found.indexOf(e) + 1).filter((o) => !(o instanceof SVGTextElement));
    let colour = null;
    const thin = [];
    for (const layer of [...(e instanceof SVGElement ? [] : [e]), ...layers]) {
      const c = painted(layer);
      if (c[3] >= 1) { colour = c; break; }
      if (c[3] > 0) thin.push(c);
    }
    colour = colour || [255, 255, 255, 1];
    for (const c of thin.reverse()) colour = [0, 1, 2].map((i) => c[i] * c[3] + colour[i] * (1 - c[3]));
    return colour.slice(0, 3);
  };
  const scrolls = (e) => e && e !== document.documentElement
    && (["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  const words = (e) => `${e.tagName.toLowerCase()}.${e.getAttribute("class") || ""} ${e.textContent.trim().slice(0, 40)}`;

  const pale = [], small = [], wide = [];
  let texts = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || ["SCRIPT", "STYLE", "TITLE", "title"].includes(e.tagName)) continue;
    const range = document.createRange();
    range.selectNodeContents(walker.currentNode);
    const box = range.getClientRects()[0];
    if (!box || !box.width || !box.height) continue;
    texts += 1;
    const style = getComputedStyle(e), svg = e instanceof SVGElement;
    const x = box.left + box.width / 2, y = box.top + box.height / 2;
    if (x >= 0 && x < innerWidth && y < innerHeight) {
      const found = contrast(rgba(svg ? style.fill : style.color), below(e, x, y));
      if (found < (style.fontWeight >= 600 ? 3 : 4.5)) pale.push(`${words(e)}: ${found.toFixed(2)}`);
    }
    const root = svg ? e.ownerSVGElement : null;
    const scale = root ? root.getBoundingClientRect().width / root.viewBox.baseVal.width : 1;
    if (parseFloat(style.fontSize) * scale < 7.5) small.push(`${words(e)}: ${parseFloat(style.fontSize) * scale}`);
  }
  for (const e of document.querySelectorAll("body *")) {
    const box = e.getBoundingClientRect();
    if (box.width && box.right > innerWidth + 1 && !scrolls(e)) wide.push(words(e));
  }
  const figures = [...document.querySelectorAll("section.picture")].map((section) => {
    const svg = section.querySelector("svg"), box = svg ? svg.getBoundingClientRect() : { width: 0, height: 0 };
    const marks = svg ? [...svg.querySelectorAll("path, use, rect")].filter((m) => m.getBoundingClientRect().width) : [];
    return { name: section.id, width: box.width, height: box.height, marks: marks.length };
  });
  const links = [...document.querySelectorAll("a[href]")].map((a) => a.getAttribute("href"));
  parent.postMessage(JSON.stringify({
    width: innerWidth,
    scroll: document.documentElement.scrollWidth,
    height: Math.ceil(document.body.getBoundingClientRect().height),
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    paper: rgba(getComputedStyle(document.body).backgroundColor),
    texts, pale, small, wide, figures, links,
    dead: links.filter((to) => to.startsWith("#") && !document.getElementById(to.slice(1))),
    fetched: performance.getEntriesByType("resource").map((r) => r.name),
  }), "*");
});
