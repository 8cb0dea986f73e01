// Typesets the formulas of each page that is shown, by the KaTeX that the site brings.
document$.subscribe(() => {
  for (const element of document.querySelectorAll(".arithmatex")) {
    const text = element.textContent.trim();
    const display = text.startsWith("\\[");
    katex.render(text.slice(2, -2), element, {
      displayMode: display,
      throwOnError: false,
    });
  }
});
