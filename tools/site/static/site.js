// What scrolls can be reached by keyboard, too.
window.addEventListener("load", () => {
  for (const part of document.querySelectorAll("pre, .table-wrapper, .output, .math, .sig"))
    if (part.scrollWidth > part.clientWidth) part.tabIndex = 0;
});
