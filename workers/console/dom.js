// Titles come from strangers: text goes in as text nodes, never as markup.
export const $ = id => document.getElementById(id);

export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("aria-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter(child => child !== null));
  return element;
}

export const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

// Text that is hidden while there is none.
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
  element.hidden = !text;
}
