"""How Sphinx draws the site that tools/docs.py stages."""
from docutils import nodes
from latex2mathml.converter import convert

project = html_title = "mhrlhf"
extensions = ["myst_nb", "sphinx_copybutton"]

html_theme = "furo"
html_static_path = ["static"]
html_css_files, html_js_files = ["site.css"], ["site.js"]
html_domain_indices = False  # reference/symbols says the same in the order of the rooms
html_show_sphinx = html_show_copyright = html_copy_source = html_show_sourcelink = False

nb_execution_mode = "off"  # what the notebooks show was run and committed
nb_ipywidgets_js = {}      # nothing is fetched from another host
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3
myst_ref_domains = ["std", "py"]
add_module_names = False
toc_object_entries_show_parents = "hide"
python_display_short_literal_types = True

# Formulas as MathML, which browsers draw by themselves: no script, and a screen reader can say them.

def inline_math(self, node):
    self.body.append(convert(node.astext()))
    raise nodes.SkipNode

def block_math(self, node):
    self.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode

suppress_warnings = ["ref.python"]  # a type in a signature whose name two modules have; prose names them in full
html_math_renderer = "mathml"

def setup(app):
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
