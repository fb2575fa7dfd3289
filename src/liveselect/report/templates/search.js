// Search among the chosen and the rejected: what does not hold all the words is hidden, rounds with a match unfold.
for (const box of document.querySelectorAll(".search")) {
  const section = box.closest("section"), input = box.querySelector("input"), found = box.querySelector("output");
  const texts = [...section.querySelectorAll("article.chosen, article.rejected")];
  const parts = [...new Set(texts.map(text => text.closest("details")))].filter(Boolean);
  const first = parts.map(part => part.open);
  box.hidden = false;
  input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let chosen = 0, rejected = 0;
    for (const text of texts) {
      const words = text.textContent.toLowerCase();
      text.hidden = !wanted.every(word => words.includes(word));
      if (!text.hidden) text.classList.contains("chosen") ? chosen++ : rejected++;
    }
    parts.forEach((part, index) => {
      part.open = wanted.length ? Boolean(part.querySelector("article:not([hidden])")) : first[index];
    });
    found.textContent = wanted.length ? `${chosen} chosen, ${rejected} rejected` : "";
  });
}
