//! One step of a playbook.

use std::collections::HashSet;
use std::time::Duration;

use serde_json::{Map, Value};

use super::closing;
use super::execution;
use super::fan::fan;
use super::flow::{self, Flow};
use super::{Fields, HTTP_REQUEST, Loader, TOOLS, params};
use super::{graph, rubric, shape};
use crate::domain::backoff::Backoff;
use crate::domain::duration;
use crate::domain::outcome::ErrorClass;
use crate::domain::playbook::keys;
use crate::domain::playbook::model::{
    Approval, IDLE_TIMEOUT, InputKind, MAX_ATTEMPTS_MAX, OnFailure, OnTimeout, Retry, STEP_TIMEOUT, Step, StepKind,
};
use crate::domain::playbook::problem::{Pos, Problem, did_you_mean, nearest};
use crate::domain::playbook::shape::Shape;
use crate::domain::playbook::template::{Part, Template};
use crate::domain::playbook::yaml::{Kind, Node};

const KEYS_LATER: &[&str] = &["concurrency", "on_unknown", "prompt"];

/// A step that has been read, and where it points to by name.
pub(super) struct Read {
    pub step: Step,
    /// What undoes it.
    pub undo: Option<Step>,
    pub at: Pos,
    pub flow: Flow,
}

/// Reads one step; `taken` holds the ids before it.
pub(super) fn step(loader: &mut Loader, node: &Node, path: &str, taken: &mut HashSet<String>) -> Option<Read> {
    let fields = Fields::open(loader, node, path, keys::STEP, KEYS_LATER)?;
    let role = role(loader, &fields, path);
    let mut flow = Flow::default();
    let kind = flow::kind(loader, &fields, node, path, &mut flow);
    flow::only_of_work(loader, &fields, node, &kind, path);
    let condition = flow::condition(loader, &fields, path);
    let on_failure = flow::on_failure(loader, &fields, path, &mut flow);
    flow.needs = graph::needs(loader, &fields, path);
    let action_node = fields.one_of(loader, &["action", "tool"]);
    let action = match &kind {
        StepKind::Work => action_node.and_then(|n| loader.text(n, &format!("{path}.action"))),
        StepKind::Goto { .. } => Some("goto".to_owned()),
        StepKind::Sleep(_) => Some("sleep".to_owned()),
        StepKind::WaitFor(_) => Some("wait_for".to_owned()),
        StepKind::Playbook(_) => Some("playbook".to_owned()),
    };
    let works = matches!(kind, StepKind::Work);
    let calls = matches!(kind, StepKind::Playbook(_));
    if works && action_node.is_none() {
        let flow = KEYS_LATER.iter().any(|key| fields.has(key));
        // A flow step has been refused already, for its own key.
        if !flow {
            loader.error(node.at, format!("{path}.action"), "a step needs an `action`");
        }
    }
    if let (Some(action), Some(at), true) = (&action, action_node, works) {
        check_action(loader, action, at, role.is_some(), path);
    }
    let fan = if works || calls { fan(loader, &fields, path) } else { None };
    loader.each = fan.is_some();
    loader.to_tool = works && goes_to_tool(role.as_deref(), action.as_deref());
    let how = how(loader, &fields, path, action.as_deref());
    loader.each = false;
    let approval = fields.get("approval").and_then(|n| approval(loader, n, &format!("{path}.approval")));
    let given = fields.one_of(loader, &["id", "name"]).and_then(|n| Some((loader.text(n, &format!("{path}.id"))?, n)));
    let id = match given {
        Some((id, at)) => {
            check_id(loader, &id, at, path, taken);
            id
        }
        None => free_id(action.as_deref().unwrap_or("step"), taken),
    };
    taken.insert(id.clone());
    let output = fields.get("output").map(|n| Shape {
        fields: Some(shape::properties(loader, n, &format!("{path}.output"))),
        ..Shape::of(InputKind::Object)
    });
    let budget = fields.get("budget").and_then(|n| execution::budget(loader, n, &format!("{path}.budget")));
    let rubric = rubric::rubric(loader, &fields, &kind, role.as_deref(), path);
    let undo = fields.get("compensate").and_then(|n| closing::compensate(loader, n, path, &id, role.as_deref()));
    let once = Retry { max_attempts: 1, ..Retry::default() };
    let retry = how.retry.clone().unwrap_or_else(|| if works { Retry::default() } else { once });
    let step = Step {
        kind,
        condition,
        fan,
        on_failure,
        retry,
        approval,
        budget,
        output,
        rubric,
        ..how.step(id, role, action?)
    };
    Some(Read { step, undo, at: node.at, flow })
}

/// Whose work it is.
pub(super) fn role(loader: &mut Loader, fields: &Fields<'_>, path: &str) -> Option<String> {
    let role = fields.one_of(loader, &["role", "agent"]).and_then(|n| loader.text(n, &format!("{path}.role")))?;
    // A reference by another dialect: `agent.marketing` is the role.
    Some(role.strip_prefix("agent.").map(str::to_owned).unwrap_or(role))
}

/// Whether what is in its parameters goes to a tool, and no agent sees it.
pub(super) fn goes_to_tool(role: Option<&str>, action: Option<&str>) -> bool {
    role.is_none() && action.is_some_and(|action| TOOLS.contains(&action))
}

/// How something is done: with what, how often, for how long, by which model.
pub(super) struct How {
    params: Map<String, Value>,
    template: Template,
    retry: Option<Retry>,
    timeout: (Duration, Duration),
    adapter: Option<String>,
    model: Option<String>,
}

pub(super) fn how(loader: &mut Loader, fields: &Fields<'_>, path: &str, action: Option<&str>) -> How {
    let params_node = fields.one_of(loader, &["params", "with"]);
    let params = params(loader, params_node, &format!("{path}.params"));
    let template = match params_node {
        Some(node) if !params.is_empty() => loader.template(node, &format!("{path}.params")),
        _ => Template::Plain(Value::Object(Map::new())),
    };
    loader.to_tool = false;
    let template = match (action, params_node) {
        (Some(HTTP_REQUEST), Some(node)) => {
            json_by_hand(loader, node, &template, &format!("{path}.params.body"));
            template.with_url("url")
        }
        _ => template,
    };
    How {
        params,
        template,
        retry: fields.get("retry").and_then(|n| retry(loader, n, &format!("{path}.retry"))),
        timeout: timeout(loader, fields, &format!("{path}.timeout")),
        adapter: fields.get("adapter").and_then(|n| loader.text(n, &format!("{path}.adapter"))),
        model: fields.get("model").and_then(|n| loader.text(n, &format!("{path}.model"))),
    }
}

/// JSON that is written as a text takes values in as they are: a quote in one would end
/// the text it stands in.
fn json_by_hand(loader: &mut Loader, params: &Node, template: &Template, path: &str) {
    let (Template::Map(values), Kind::Map(nodes)) = (template, &params.kind) else { return };
    let body = values.iter().find(|(key, _)| key == "body");
    let node = nodes.iter().find(|(key, _)| key.text == "body");
    if let (Some((_, Template::Text(parts))), Some((_, node))) = (body, node)
        && let Some(Part::Text(begin)) = parts.first()
        && begin.trim_start().starts_with(['{', '['])
    {
        let message = "values are put into this JSON as they are, quotes too".to_owned();
        let hint = Some("write it as a map or a list instead of a text".to_owned());
        loader.push(Problem { warning: true, ..Problem::error(node.at, path, message).suggest(hint) });
    }
}

impl How {
    /// A step that does just that.
    pub(super) fn step(self, id: String, role: Option<String>, action: String) -> Step {
        Step {
            id,
            kind: StepKind::Work,
            condition: None,
            fan: None,
            on_failure: OnFailure::Abort,
            role,
            action,
            params: self.params,
            template: self.template,
            retry: self.retry.unwrap_or_default(),
            timeout: self.timeout.0,
            idle: self.timeout.1,
            approval: None,
            adapter: self.adapter,
            model: self.model,
            budget: None,
            output: None,
            rubric: None,
            needs: Vec::new(),
            undoes: None,
            last_use: None,
        }
    }
}

pub(super) fn check_action(loader: &mut Loader, action: &str, at: &Node, has_role: bool, path: &str) {
    if TOOLS.contains(&action) {
        return;
    }
    let path = format!("{path}.action");
    // What looks like a tool's name and is nearly one is a slip, not a wish
    // for an agent to interpret.
    if let Some(near) = nearest(action, TOOLS.iter().copied())
        && (action.contains('.') || !has_role)
    {
        loader.suggest(at.at, &path, format!("unknown tool `{action}`"), Some(format!("did you mean `{near}`?")));
    } else if !has_role {
        loader.suggest(
            at.at,
            &path,
            format!("`{action}` is no tool, so the step needs a `role` to do it"),
            Some(format!("the tools are {}", TOOLS.join(", "))),
        );
    }
}

fn check_id(loader: &mut Loader, id: &str, at: &Node, path: &str, taken: &HashSet<String>) {
    let path = format!("{path}.id");
    if !id.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-') || id.len() > 64 {
        loader.error(at.at, path, format!("`{id}` cannot be referred to; use up to 64 letters, digits, `_` and `-`"));
    } else if taken.contains(id) {
        loader.error(at.at, path, format!("another step is called `{id}` already"));
    }
}

/// A step without an id is called after its action.
pub(in crate::domain::playbook) fn free_id(action: &str, taken: &HashSet<String>) -> String {
    let base: String =
        action.chars().take(60).map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' }).collect();
    std::iter::once(base.clone())
        .chain((2..).map(|n| format!("{base}_{n}")))
        .find(|id| !taken.contains(id))
        .unwrap_or(base)
}

pub(super) fn duration_of(loader: &mut Loader, node: &Node, path: &str) -> Option<Duration> {
    let text = loader.text(node, path)?;
    match duration::parse(&text) {
        Ok(d) if d.is_zero() => {
            loader.error(node.at, path, "must be longer than nothing");
            None
        }
        Ok(d) => Some(d),
        Err(error) => {
            loader.error(node.at, path, error.to_string());
            None
        }
    }
}

/// `timeout: 5m`, or `{hard: 2h, idle: 5m}`: how long an attempt may take, and how long
/// nothing may come of it. Who says only the first means no other.
fn timeout(loader: &mut Loader, fields: &Fields<'_>, path: &str) -> (Duration, Duration) {
    let Some(node) = fields.get("timeout") else { return (STEP_TIMEOUT, IDLE_TIMEOUT) };
    if !matches!(node.kind, Kind::Map(_)) {
        let hard = duration_of(loader, node, path).unwrap_or(STEP_TIMEOUT);
        return (hard, hard);
    }
    let Some(fields) = Fields::open(loader, node, path, keys::TIMEOUT, &[]) else {
        return (STEP_TIMEOUT, IDLE_TIMEOUT);
    };
    let mut of = |key: &str| fields.get(key).and_then(|n| duration_of(loader, n, &format!("{path}.{key}")));
    let (hard, idle) = (of("hard"), of("idle"));
    let limit = hard.unwrap_or(STEP_TIMEOUT);
    if let Some(idle) = idle.filter(|idle| *idle > limit) {
        let (idle, limit) = (duration::written(idle), duration::written(limit));
        let hint = Some("write a longer `hard`, or a shorter `idle`".to_owned());
        loader.suggest(node.at, path, format!("`idle` of {idle} is longer than `hard`, {limit}"), hint);
    }
    (limit, idle.unwrap_or(limit))
}

/// `retry: 3`, or a map.
fn retry(loader: &mut Loader, node: &Node, path: &str) -> Option<Retry> {
    let mut retry = Retry::default();
    if let Kind::Int(_) = node.kind {
        retry.max_attempts = attempts(loader, node, path)?;
        return Some(retry);
    }
    let fields = Fields::open(loader, node, path, keys::RETRY, &[])?;
    if let Some(n) = fields.get("max_attempts") {
        retry.max_attempts = attempts(loader, n, &format!("{path}.max_attempts"))?;
    }
    let mut backoff = Backoff::default();
    if let Some(n) = fields.get("initial") {
        backoff.initial = duration_of(loader, n, &format!("{path}.initial"))?;
        backoff.max = backoff.max.max(backoff.initial);
    }
    if let Some(n) = fields.get("max") {
        backoff.max = duration_of(loader, n, &format!("{path}.max"))?;
    }
    match fields.get("jitter").map(|n| (&n.kind, n.at)) {
        None => {}
        Some((Kind::Bool(jitter), _)) => backoff.jitter = *jitter,
        Some((_, at)) => loader.error(at, format!("{path}.jitter"), "expected true or false"),
    }
    match fields.get("backoff").map(|n| (&n.kind, n.at)) {
        None => {}
        Some((Kind::Str(word), _)) if word == "exponential" => {}
        Some((Kind::Str(word), _)) if word == "constant" || word == "fixed" => backoff.factor = 1.0,
        Some((Kind::Int(n), _)) if *n >= 1 => backoff.factor = *n as f64,
        Some((Kind::Float(n), _)) if *n >= 1.0 => backoff.factor = *n,
        Some((_, at)) => {
            loader.error(at, format!("{path}.backoff"), "expected `exponential`, `constant` or a factor from 1");
        }
    }
    retry.backoff = backoff;
    if let Some(n) = fields.get("on") {
        retry.on = classes(loader, n, &format!("{path}.on"))?;
    }
    Some(retry)
}

fn attempts(loader: &mut Loader, node: &Node, path: &str) -> Option<u32> {
    match node.kind {
        Kind::Int(n) if (1..=i64::from(MAX_ATTEMPTS_MAX)).contains(&n) => u32::try_from(n).ok(),
        _ => {
            loader.error(node.at, path, format!("expected a number from 1 to {MAX_ATTEMPTS_MAX}"));
            None
        }
    }
}

fn classes(loader: &mut Loader, node: &Node, path: &str) -> Option<Vec<ErrorClass>> {
    let Kind::Seq(items) = &node.kind else {
        loader.error(node.at, path, "expected a list of error classes");
        return None;
    };
    let names = ["transient", "rate_limited", "timeout", "invalid", "governance"];
    items
        .iter()
        .map(|item| {
            let word = loader.text(item, path)?;
            let class = ErrorClass::from_name(&word).filter(|_| names.contains(&word.as_str()));
            if class.is_none() {
                loader.suggest(
                    item.at,
                    path,
                    format!("unknown error class `{word}`"),
                    did_you_mean(&word, names).or_else(|| Some(format!("the classes are {}", names.join(", ")))),
                );
            }
            class
        })
        .collect()
}

/// How many reviewers a gate may name.
const REVIEWERS_MAX: usize = 50;

/// `reviewers: [founder, admin]`, or one.
fn reviewers(loader: &mut Loader, node: &Node, path: &str) -> Vec<String> {
    let path = format!("{path}.reviewers");
    let names: Vec<String> = match &node.kind {
        Kind::Seq(items) => items.iter().filter_map(|item| loader.text(item, &path)).collect(),
        Kind::Str(_) => loader.text(node, &path).into_iter().collect(),
        _ => {
            let found = node.describe();
            loader.error(node.at, &path, format!("expected a list of names of keys, found {found}"));
            return Vec::new();
        }
    };
    if names.is_empty() {
        loader.error(node.at, &path, "a gate that nobody may open; name somebody, or leave it out");
    }
    if names.len() > REVIEWERS_MAX {
        loader.error(node.at, &path, format!("over the limit of {REVIEWERS_MAX} names"));
    }
    names
}

/// `approval: required`, or a map.
fn approval(loader: &mut Loader, node: &Node, path: &str) -> Option<Approval> {
    match &node.kind {
        Kind::Str(word) if word == "required" => return Some(Approval::default()),
        Kind::Bool(true) => return Some(Approval::default()),
        Kind::Bool(false) => return None,
        Kind::Str(word) if word == "none" => return None,
        Kind::Str(word) => {
            let near = did_you_mean(word, ["required"]);
            loader.suggest(
                node.at,
                path,
                format!("unknown approval `{word}`"),
                near.or_else(|| Some("write `required`".into())),
            );
            return None;
        }
        _ => {}
    }
    let fields = Fields::open(loader, node, path, keys::APPROVAL, &[])?;
    let mut approval = Approval::default();
    if let Some(n) = fields.get("timeout") {
        approval.timeout = duration_of(loader, n, &format!("{path}.timeout"))?;
    }
    match fields.get("on_timeout").map(|n| (&n.kind, n.at)) {
        None => {}
        Some((Kind::Str(word), _)) if word == "reject" => {}
        Some((Kind::Str(word), _)) if word == "approve" => approval.on_timeout = OnTimeout::Approve,
        Some((Kind::Str(word), _)) if word == "escalate" => approval.on_timeout = OnTimeout::Escalate,
        Some((_, at)) => loader.error(at, format!("{path}.on_timeout"), "expected `reject`, `approve` or `escalate`"),
    }
    approval.reviewers = fields.get("reviewers").map(|n| reviewers(loader, n, path)).unwrap_or_default();
    approval.message = fields.get("message").and_then(|n| loader.text(n, &format!("{path}.message")));
    Some(approval)
}
