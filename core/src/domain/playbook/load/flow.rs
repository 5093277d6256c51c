//! What leads a run from step to step otherwise than in order: conditions,
//! jumps, pauses, and what follows a failure.

use serde_json::{Map, Value};

use super::step::{Read, duration_of};
use super::{Fields, Loader};
use crate::domain::event::is_event_name;
use crate::domain::playbook::expr::{self, Budget, Expr, Reference, Scope};
use crate::domain::playbook::keys;
use crate::domain::playbook::model::{OnFailure, Pause, RUN_STEPS_MAX, StepKind, WAIT_TIMEOUT, WaitFor};
use crate::domain::playbook::problem::{Pos, Problem, did_you_mean};
use crate::domain::playbook::template::Template;
use crate::domain::playbook::yaml::{Kind, Node};

/// How many jumps a playbook may have.
const LOOPS_MAX: usize = 50;

/// Where a step points to, by name, until all steps are known.
#[derive(Debug, Default)]
pub(super) struct Flow {
    goto: Option<(String, Pos)>,
    on_failure: Option<(String, Pos)>,
    /// The steps that it needs, where it says so.
    pub needs: Option<Vec<(String, Pos)>>,
}

/// What kind of step it is.
pub(super) fn kind(loader: &mut Loader, fields: &Fields<'_>, node: &Node, path: &str, flow: &mut Flow) -> StepKind {
    let (goto, sleep, wait) = (fields.get("goto"), fields.get("sleep"), fields.get("wait_for"));
    let work = ["action", "tool"].into_iter().find(|key| fields.has(key));
    let called = fields.get("playbook");
    let kinds = work.into_iter().chain(goto.map(|_| "goto")).chain(sleep.map(|_| "sleep"));
    let kinds: Vec<&str> = kinds.chain(wait.map(|_| "wait_for")).chain(called.map(|_| "playbook")).collect();
    if let [first, second, ..] = kinds.as_slice() {
        loader.error(node.at, path, format!("`{first}` and `{second}` are two things; write a step for each"));
    }
    if goto.is_none()
        && let Some(retries) = fields.get("max_retries")
    {
        let hint = Some("write `retry: {max_attempts: 3}` for more tries of a step".to_owned());
        loader.suggest(retries.at, &format!("{path}.max_retries"), "belongs to a `goto`".into(), hint);
    }
    if let Some(target) = goto {
        flow.goto = loader.text(target, &format!("{path}.goto")).map(|name| (name, target.at));
        let jumps_max = jumps_max(loader, fields, node, path);
        return StepKind::Goto { target: 0, jumps_max };
    }
    match (sleep, wait) {
        (Some(pause), _) => StepKind::Sleep(self::pause(loader, pause, &format!("{path}.sleep"))),
        (None, Some(wait)) => StepKind::WaitFor(wait_for(loader, wait, &format!("{path}.wait_for"))),
        (None, None) => match called {
            Some(called) => StepKind::Playbook(loader.text(called, &format!("{path}.playbook")).unwrap_or_default()),
            None => StepKind::Work,
        },
    }
}

/// `wait_for: payment.received`, or a map.
fn wait_for(loader: &mut Loader, node: &Node, path: &str) -> WaitFor {
    let mut wait = WaitFor {
        event: Template::Plain(Value::Null),
        matching: Template::Plain(Value::Object(Map::new())),
        timeout: WAIT_TIMEOUT,
    };
    if let Kind::Str(_) = node.kind {
        wait.event = event(loader, node, path).unwrap_or(wait.event);
        return wait;
    }
    let Some(fields) = Fields::open(loader, node, path, keys::WAIT_FOR, &[]) else { return wait };
    match fields.get("event") {
        Some(n) => wait.event = event(loader, n, &format!("{path}.event")).unwrap_or(wait.event),
        None => loader.error(node.at, format!("{path}.event"), "a wait needs the name of an `event`"),
    }
    if let Some(timeout) = fields.get("timeout").and_then(|n| duration_of(loader, n, &format!("{path}.timeout"))) {
        wait.timeout = timeout;
    }
    if let Some(n) = fields.get("match") {
        let path = format!("{path}.match");
        match n.kind {
            Kind::Map(_) => wait.matching = loader.template(n, &path),
            _ => {
                let found = n.describe();
                loader.error(n.at, path, format!("expected a map of what the event's data holds, found {found}"));
            }
        }
    }
    wait
}

fn event(loader: &mut Loader, node: &Node, path: &str) -> Option<Template> {
    loader.text(node, path)?;
    match loader.template(node, path) {
        Template::Plain(Value::String(name)) if !is_event_name(&name) => {
            let hint = Some("use up to 200 letters, digits, `.`, `_`, `-`, `:` and `/`".to_owned());
            loader.suggest(node.at, path, format!("`{name}` cannot be an event's name"), hint);
            None
        }
        template => Some(template),
    }
}

/// What only a step that does something has: a guard that would not hold is
/// refused.
const OF_WORK: &[&str] = &[
    "role",
    "agent",
    "for_each",
    "max_parallel",
    "max_items",
    "min_success",
    "on_item_failure",
    "params",
    "with",
    "retry",
    "approval",
    "adapter",
    "model",
    "compensate",
    "output",
    "rubric",
];

/// What only a step has that is done by an agent or a tool.
const OF_ACTION: &[&str] = &["role", "agent", "timeout", "adapter", "model", "rubric"];

/// Refuses what a step of another kind does not carry out.
pub(super) fn only_of_work(loader: &mut Loader, fields: &Fields<'_>, node: &Node, kind: &StepKind, path: &str) {
    let word = match kind {
        StepKind::Work => return,
        StepKind::Playbook(_) => {
            for key in OF_ACTION.iter().filter(|key| fields.has(key)) {
                let at = fields.get(key).map_or(node.at, |value| value.at);
                loader.error(at, format!("{path}.{key}"), "belongs to the steps of the other playbook");
            }
            return;
        }
        StepKind::Goto { .. } => "goto",
        StepKind::Sleep(_) => "sleep",
        StepKind::WaitFor(_) => "wait_for",
    };
    for key in OF_WORK.iter().filter(|key| fields.has(key)) {
        let at = fields.get(key).map_or(node.at, |value| value.at);
        loader.error(at, format!("{path}.{key}"), format!("belongs to a step with an `action`, not to a `{word}`"));
    }
}

/// A loop has an end.
fn jumps_max(loader: &mut Loader, fields: &Fields<'_>, node: &Node, path: &str) -> u32 {
    let path = format!("{path}.max_retries");
    match fields.get("max_retries").map(|n| (&n.kind, n.at)) {
        Some((Kind::Int(n), at)) => match u32::try_from(*n).ok().filter(|n| (1..=RUN_STEPS_MAX as u32).contains(n)) {
            Some(jumps) => return jumps,
            None => loader.error(at, path, format!("expected a number from 1 to {RUN_STEPS_MAX}")),
        },
        Some((_, at)) => loader.error(at, path, format!("expected a number from 1 to {RUN_STEPS_MAX}")),
        None => {
            let hint = Some("write how often it may jump, such as `max_retries: 2`".to_owned());
            loader.suggest(node.at, &path, "a `goto` without a limit may never end".into(), hint);
        }
    }
    1
}

fn pause(loader: &mut Loader, node: &Node, path: &str) -> Pause {
    if let Kind::Str(text) = &node.kind
        && (text.contains("${") || text.contains("{{"))
    {
        return Pause::Computed(loader.template(node, path));
    }
    Pause::Fixed(duration_of(loader, node, path).unwrap_or_default())
}

/// `if: …`, as text or as a plain `true` or `false`.
pub(super) fn condition(loader: &mut Loader, fields: &Fields<'_>, path: &str) -> Option<Expr> {
    let node = fields.get("if")?;
    let path = format!("{path}.if");
    let condition = expression(loader, node, &path)?;
    // What looks nothing up is always the same.
    let never = condition.references().is_empty() && condition.holds(&Nothing, &mut Budget::default()) == Ok(false);
    if never {
        let message = "this never holds, so that the step is never done".to_owned();
        loader.push(Problem { warning: true, ..Problem::error(node.at, path, message) });
    }
    Some(condition)
}

/// Where nothing can be looked up.
struct Nothing;

impl Scope for Nothing {
    fn lookup(&self, _: &Reference) -> Option<(&Value, usize)> {
        None
    }
}

/// An expression, as text or as a plain `true` or `false`.
pub(super) fn expression(loader: &mut Loader, node: &Node, path: &str) -> Option<Expr> {
    let text = match &node.kind {
        Kind::Bool(holds) => holds.to_string(),
        _ => loader.text(node, path)?,
    };
    match expr::parse(&text) {
        Ok(expr) if expr.quotes_a_template() => {
            let hint = Some("write the path without quotes: steps.review.output == 'approved'".to_owned());
            loader.suggest(node.at, path, "text in quotes is text; nothing is put in there".into(), hint);
            None
        }
        Ok(expr) => {
            loader.note_uses(expr.uses(), node.at, path);
            Some(expr)
        }
        Err(message) => {
            loader.error(node.at, path, message);
            None
        }
    }
}

/// `on_failure: abort`, `continue`, or the id of a later step.
pub(super) fn on_failure(loader: &mut Loader, fields: &Fields<'_>, path: &str, flow: &mut Flow) -> OnFailure {
    let Some(node) = fields.get("on_failure") else { return OnFailure::Abort };
    match loader.text(node, &format!("{path}.on_failure")).as_deref() {
        None | Some("abort") => OnFailure::Abort,
        Some("continue") => OnFailure::Continue,
        Some(id) => {
            flow.on_failure = Some((id.to_owned(), node.at));
            OnFailure::Goto(0)
        }
    }
}

/// Finds the steps that others point to, and holds loops to an end that can be
/// reached.
pub(super) fn resolve(loader: &mut Loader, steps: &mut [Read]) {
    let ids: Vec<String> = steps.iter().map(|read| read.step.id.clone()).collect();
    let mut loops = steps.iter().filter(|read| matches!(read.step.kind, StepKind::Goto { .. }));
    if let Some(read) = loops.nth(LOOPS_MAX) {
        loader.error(read.at, "steps", format!("over the limit of {LOOPS_MAX} jumps"));
        return;
    }
    let mut again = 0_usize;
    for (index, Read { step, at, flow, .. }) in steps.iter_mut().enumerate() {
        let path = format!("steps.{index}");
        if let (StepKind::Goto { target, jumps_max }, Some((name, at))) = (&mut step.kind, &flow.goto)
            && let Some(found) = find(loader, &ids, name, *at, &format!("{path}.goto"))
        {
            *target = found;
            if found > index {
                let hint = Some("to leave steps out, write `if` on them".to_owned());
                loader.suggest(*at, &format!("{path}.goto"), format!("`{name}` does not come before this step"), hint);
            }
            again = again.saturating_add((index - found.min(index) + 1).saturating_mul(*jumps_max as usize));
        }
        if let (OnFailure::Goto(target), Some((name, at))) = (&mut step.on_failure, &flow.on_failure)
            && let Some(found) = find_or(loader, &ids, name, *at, &format!("{path}.on_failure"), &["abort", "continue"])
        {
            *target = found;
            if found <= index {
                loader.error(*at, format!("{path}.on_failure"), format!("`{name}` does not come after this step"));
            }
        }
        if again + ids.len() > RUN_STEPS_MAX {
            let message = format!("the loops may take {again} steps again, over the limit of {RUN_STEPS_MAX} a run");
            loader.error(*at, format!("{path}.max_retries"), message);
            return;
        }
    }
}

pub(super) fn find(loader: &mut Loader, ids: &[String], name: &str, at: Pos, path: &str) -> Option<usize> {
    find_or(loader, ids, name, at, path, &[])
}

fn find_or(loader: &mut Loader, ids: &[String], name: &str, at: Pos, path: &str, words: &[&str]) -> Option<usize> {
    let found = ids.iter().position(|id| id == name);
    if found.is_none() {
        let near = did_you_mean(name, ids.iter().map(String::as_str).chain(words.iter().copied()));
        loader.suggest(at, path, format!("there is no step `{name}`"), near);
    }
    found
}
