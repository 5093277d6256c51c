//! From a tree of YAML to a [`Playbook`], every problem collected with its
//! place. The dialects differ in names only, so each key has its synonyms:
//! `id`/`name`, `role`/`agent`, `action`/`tool`, `params`/`with`.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use serde_json::{Map, Value};

use super::expr::Reference;
use super::keys;
use super::model::{InputKind, InputSpec, Playbook, Step};
use super::problem::{Pos, Problem};
use super::shape::Shape;
use super::template::{self, Template};
use super::yaml::{self, Kind, Node};
use super::{INPUTS_MAX, STEPS_MAX};

mod check;
mod closing;
mod concurrency;
mod execution;
mod fan;
mod fields;
mod flow;
mod graph;
mod rubric;
mod secrets;
mod shape;
mod step;
mod trigger;

pub(crate) use fields::Fields;
pub(super) use step::free_id;

/// Keys of the language that this version does not carry out yet; refused, so
/// that nobody believes in a guard that is not there.
const TOP_KEYS_LATER: &[&str] = &["role"];

/// The tool whose `url` is one, and whose `body` is often JSON.
pub(super) const HTTP_REQUEST: &str = "http.request";

/// The tools that run without an agent's model.
pub const TOOLS: &[&str] = &[
    HTTP_REQUEST,
    "file.read",
    "file.write",
    "transform",
    "web_search",
    "shell.run",
    "code.execute",
    "send_message",
    "create_task",
    "list_tasks",
    "run_playbook",
    "memory.read",
    "memory.search",
    "memory.write",
];

/// How many problems of a playbook are told.
const PROBLEMS_MAX: usize = 200;

/// Reads and checks a playbook: the model, or every problem at once.
pub fn load(text: &str) -> Result<Playbook, Vec<Problem>> {
    read(text).map(|(playbook, _)| playbook)
}

/// The same, with the warnings of what loads.
pub fn read(text: &str) -> Result<(Playbook, Vec<Problem>), Vec<Problem>> {
    let root = yaml::read(text).map_err(|problem| vec![problem])?;
    let mut loader = Loader {
        problems: Vec::new(),
        uses: Vec::new(),
        place: Place::End,
        each: false,
        to_tool: false,
        partial: false,
    };
    let playbook = loader.playbook(&root);
    let mut problems = loader.problems;
    problems.sort_by_key(|p| (p.at.line, p.at.column));
    match playbook {
        Some(playbook) if problems.iter().all(|problem| problem.warning) => Ok((playbook, problems)),
        _ => Err(problems),
    }
}

pub(crate) struct Loader {
    problems: Vec<Problem>,
    /// What is looked up where.
    uses: Vec<Use>,
    /// What is read.
    place: Place,
    /// What is read is done for each item of a list.
    each: bool,
    /// What is read goes to a tool.
    to_tool: bool,
    /// A step could not be read, so that it is not known what comes before what.
    partial: bool,
}

/// A part of a playbook, by what it can look up there.
#[derive(Clone, Copy)]
enum Place {
    /// Before the first step.
    Start,
    /// A step.
    Step(usize),
    /// What computes a criterion of a step.
    Graded(usize),
    /// What undoes a step.
    Undo(usize),
    /// What is done in any case, when the steps are over.
    Finally(usize),
    /// Behind the last step.
    End,
}

/// A place where something is looked up.
struct Use {
    place: Place,
    /// What is not there is no error.
    optional: bool,
    /// There is an item.
    each: bool,
    /// It goes to a tool.
    to_tool: bool,
    at: Pos,
    path: Arc<str>,
    reference: Reference,
}

impl Loader {
    fn error(&mut self, at: Pos, path: impl Into<String>, message: impl Into<String>) {
        self.push(Problem::error(at, path, message));
    }

    fn push(&mut self, problem: Problem) {
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(problem);
        }
    }

    fn suggest(&mut self, at: Pos, path: &str, message: String, suggestion: Option<String>) {
        self.push(Problem::error(at, path, message).suggest(suggestion));
    }

    fn playbook(&mut self, root: &Node) -> Option<Playbook> {
        let fields = Fields::open(self, root, "", keys::TOP, TOP_KEYS_LATER)?;
        let name = fields.one_of(self, &["name", "playbook"]).and_then(|node| self.text(node, "name"));
        // What is written and is no name was told already, but for nothing at all.
        if name.is_none() && !self.problems.iter().any(|problem| problem.path == "name") {
            self.error(root.at, "name", "a playbook needs a `name`");
        }
        let description = fields.get("description").and_then(|n| self.text(n, "description"));
        if let Some(version) = fields.get("version")
            && !matches!(version.kind, Kind::Int(n) if n > 0)
        {
            self.error(version.at, "version", "the version is a whole number from 1");
        }
        let trigger = trigger::trigger(self, &fields);
        let inputs = self.inputs(fields.get("inputs"));
        check::unattended(self, trigger.as_ref(), &inputs, fields.get("inputs").map_or(root.at, |node| node.at));
        let idempotency_key = fields.get("idempotency_key").and_then(|node| {
            self.text(node, "idempotency_key")?;
            // It is made when a run starts: no step has said anything yet.
            self.place = Place::Start;
            let template = self.template(node, "idempotency_key");
            self.place = Place::End;
            Some(template)
        });
        let concurrency = fields.get("concurrency").and_then(|node| concurrency::concurrency(self, node));
        let execution = execution::execution(self, fields.get("execution"));
        let budget = fields.get("budget").and_then(|node| execution::budget(self, node, "budget"));
        let mut taken = HashSet::new();
        let steps = self.steps(root, fields.get("steps"), &mut taken);
        let finally = closing::finally(self, fields.get("finally"), &mut taken);
        let limits = rubric::limits(self, fields.get("rubric"));
        let output = fields.get("output").map(|node| self.template(node, "output"));
        check::calls_itself(self, name.as_deref(), &steps);
        let graph = graph::is_graph(&steps);
        let secrets = secrets::secrets(self, fields.get("secrets"));
        secrets::unused(self, fields.get("secrets"), &secrets);
        check::references(self, &steps, &finally, &inputs, &secrets);
        let (steps, closing) = closing::join(steps, finally);
        let mut playbook = Playbook {
            name: name?,
            description,
            trigger: trigger?,
            inputs,
            idempotency_key,
            concurrency,
            execution,
            budget,
            secrets,
            steps: with_uses(steps, output.as_ref()),
            graph,
            closing,
            rubric: fields.get("rubric").map(Node::to_json),
            limits,
            output,
            unreadable: None,
        };
        if playbook.limits_what_is_said() {
            let end = Some(playbook.steps.len());
            playbook.steps.iter_mut().for_each(|step| step.last_use = end);
        }
        Some(playbook)
    }

    /// Text, also written as a number; anything else is a problem.
    fn text(&mut self, node: &Node, path: &str) -> Option<String> {
        let text = match &node.kind {
            Kind::Str(text) => text.trim().to_owned(),
            Kind::Int(n) => n.to_string(),
            _ => {
                let found = node.describe();
                self.error(node.at, path, format!("expected text, found {found}"));
                return None;
            }
        };
        if text.is_empty() {
            self.error(node.at, path, "must not be empty");
            return None;
        }
        Some(text)
    }

    /// A value with its expressions; each wrong one is told at its own place.
    fn template(&mut self, node: &Node, path: &str) -> Template {
        match &node.kind {
            Kind::Str(_) => match template::compile(&node.to_json()) {
                Ok(template) => {
                    secrets::stand_alone(self, &template, node.at, path);
                    self.note_uses(template.uses(), node.at, path);
                    template
                }
                Err(message) => {
                    self.error(node.at, path, message);
                    Template::Plain(Value::Null)
                }
            },
            Kind::Seq(items) => {
                let items = items.iter().enumerate().map(|(at, item)| self.template(item, &format!("{path}.{at}")));
                Template::list(items.collect())
            }
            Kind::Map(entries) => {
                let entries = entries
                    .iter()
                    .map(|(key, item)| (key.text.clone(), self.template(item, &format!("{path}.{}", key.text))));
                Template::map(entries.collect())
            }
            _ => Template::Plain(node.to_json()),
        }
    }

    /// Remembers what is looked up where, until all steps are known.
    fn note_uses(&mut self, references: Vec<(&Reference, bool)>, at: Pos, path: &str) {
        let (place, each, to_tool, path): (_, _, _, Arc<str>) = (self.place, self.each, self.to_tool, path.into());
        let uses = references.into_iter().map(|(reference, optional)| Use {
            optional,
            place,
            each,
            to_tool,
            at,
            path: path.to_owned(),
            reference: reference.clone(),
        });
        self.uses.extend(uses);
    }

    fn inputs(&mut self, node: Option<&Node>) -> Vec<InputSpec> {
        let Some(node) = node else { return Vec::new() };
        let Kind::Map(entries) = &node.kind else {
            let found = node.describe();
            self.error(node.at, "inputs", format!("expected a map of names, found {found}"));
            return Vec::new();
        };
        if entries.len() > INPUTS_MAX {
            self.error(node.at, "inputs", format!("over the limit of {INPUTS_MAX} inputs"));
        }
        entries.iter().filter_map(|(key, spec)| self.input(&key.text, spec)).collect()
    }

    fn input(&mut self, name: &str, node: &Node) -> Option<InputSpec> {
        let path = format!("inputs.{name}");
        let mut input = InputSpec {
            name: name.to_owned(),
            shape: Shape::of(InputKind::Any),
            required: false,
            default: None,
            description: None,
        };
        if let Kind::Map(_) = &node.kind {
            let fields = Fields::open(self, node, &path, keys::INPUT, &[])?;
            input.shape = shape::details(self, &fields, &path)?;
            input.required = shape::flag(self, &fields, &path);
            input.default = fields.get("default").map(Node::to_json);
            input.description = fields.get("description").and_then(|n| self.text(n, &path));
        } else {
            // `topic: string` for short, `topic:` for anything.
            input.shape = shape::read(self, node, &path)?.0;
        }
        if let Some(default) = &input.default
            && let Some(problem) = input.shape.problem(default)
        {
            let at = node.get("default").map_or(node.at, |default| default.at);
            self.error(at, format!("{path}.default"), format!("the default {problem}"));
        }
        Some(input)
    }

    fn steps(&mut self, root: &Node, node: Option<&Node>, taken: &mut HashSet<String>) -> Vec<step::Read> {
        let Some(node) = node else {
            self.error(root.at, "steps", "a playbook needs `steps`");
            return Vec::new();
        };
        let Kind::Seq(items) = &node.kind else {
            let found = node.describe();
            self.suggest(
                node.at,
                "steps",
                format!("expected a list, found {found}"),
                Some("begin each step with a dash".into()),
            );
            return Vec::new();
        };
        if items.is_empty() {
            self.error(node.at, "steps", "a playbook needs at least one step");
        }
        if items.len() > STEPS_MAX {
            self.error(node.at, "steps", format!("{} steps, over the limit of {STEPS_MAX}", items.len()));
            return Vec::new();
        }
        let mut steps = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            self.place = Place::Step(index);
            steps.extend(step::step(self, item, &format!("steps.{index}"), taken));
        }
        self.place = Place::End;
        // A step that could not be read would shift the places of the others.
        self.partial = steps.len() < items.len();
        if !self.partial {
            flow::resolve(self, &mut steps);
            graph::resolve(self, &mut steps);
        }
        steps
    }
}

/// An object of parameters, empty when not written.
fn params(loader: &mut Loader, node: Option<&Node>, path: &str) -> Map<String, Value> {
    match node.map(|n| (n, n.to_json())) {
        None | Some((_, Value::Null)) => Map::new(),
        Some((_, Value::Object(map))) => map,
        Some((node, _)) => {
            let found = node.describe();
            loader.error(node.at, path, format!("expected a map of parameters, found {found}"));
            Map::new()
        }
    }
}

/// Notes at each step where its output is used last, so that a run carries no
/// output for longer than somebody refers to it.
fn with_uses(mut steps: Vec<Step>, output: Option<&template::Template>) -> Vec<Step> {
    let mut uses: HashMap<String, Vec<usize>> = HashMap::new();
    // The run's output comes last, however many steps there are.
    let places = steps.iter().map(Step::references).chain(output.map(template::Template::references));
    for (at, references) in places.enumerate() {
        for reference in references.iter().filter(|r| r.name(0) == Some("steps")) {
            uses.entry(reference.name(1).unwrap_or_default().to_owned()).or_default().push(at);
        }
    }
    // What is used inside a loop is used as long as the loop may come again.
    let loops: Vec<(usize, usize)> =
        steps.iter().enumerate().filter_map(|(at, step)| step.jumps_back_from(at)).collect();
    for step in &mut steps {
        let uses: &[usize] = uses.get(&step.id).map_or(&[], Vec::as_slice);
        let mut last = uses.iter().copied().max();
        // A loop may lie within another, or reach into it.
        loop {
            let used_in = |(first, end): &&(usize, usize)| {
                let inside = |at: &usize| (first..=end).contains(&at);
                uses.iter().any(inside) || last.iter().any(inside)
            };
            let end = loops.iter().filter(used_in).map(|(_, end)| *end).max();
            if end <= last {
                break;
            }
            last = end;
        }
        step.last_use = last;
    }
    steps
}

#[cfg(test)]
mod tests;
