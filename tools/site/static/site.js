// What scrolls can be reached by keyboard, too.
function reachable() {
  for (const part of document.querySelectorAll("pre, .table-wrapper, .output, .math, .sig"))
    if (part.scrollWidth > part.clientWidth || part.scrollHeight > part.clientHeight) part.tabIndex = 0;
}
for (const moment of ["load", "resize"]) window.addEventListener(moment, reachable);
