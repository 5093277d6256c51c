//! What two versions of a playbook mean differently: order of keys, dialect,
//! comments and the way a value is written do not count.

use serde::Serialize;
use serde_json::{Map, Value};

use super::canonical::canonical;
use super::problem::Problem;
use super::yaml;

/// How a place differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// It is new.
    Added,
    /// It is gone.
    Removed,
    /// It has another value.
    Changed,
    /// A step has another place among those that stay.
    Moved,
}

/// A difference.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Change {
    /// Where, e.g. `steps.draft.timeout`; a step is called by its id.
    pub path: String,
    /// How.
    pub kind: Kind,
    /// What it was; of a step that moved, the step before it.
    pub from: Value,
    /// What it is; of a step that moved, the step before it.
    pub to: Value,
}

/// What differs between two texts that load.
pub fn diff(from: &str, to: &str) -> Result<Vec<Change>, Problem> {
    let (from, to) = (meaning(from)?, meaning(to)?);
    let mut changes = Vec::new();
    maps(&from, &to, "", &mut changes);
    Ok(changes)
}

/// Lists of steps, whose order counts.
const LISTS: &[&str] = &["steps", "finally"];

/// The canonical form, its steps by their ids.
fn meaning(text: &str) -> Result<Map<String, Value>, Problem> {
    let Value::Object(mut top) = canonical(&yaml::read(text)?).to_json() else { return Ok(Map::new()) };
    // It counts nothing: the numbers of versions are given.
    top.remove("version");
    for list in LISTS {
        if let Some(Value::Array(steps)) = top.get_mut(*list).map(Value::take) {
            let by_id = steps.into_iter().filter_map(|mut step| {
                let id = step.as_object_mut()?.shift_remove("id")?;
                Some((id.as_str()?.to_owned(), step))
            });
            top.insert((*list).into(), Value::Object(by_id.collect()));
        }
    }
    Ok(top)
}

fn maps(from: &Map<String, Value>, to: &Map<String, Value>, path: &str, changes: &mut Vec<Change>) {
    let at = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    for (name, was) in from.iter().filter(|(name, _)| !to.contains_key(*name)) {
        changes.push(Change { path: at(name), kind: Kind::Removed, from: was.clone(), to: Value::Null });
    }
    for (name, is) in to {
        match (from.get(name), is) {
            (None, is) => changes.push(Change { path: at(name), kind: Kind::Added, from: Value::Null, to: is.clone() }),
            (Some(Value::Object(was)), Value::Object(is)) => {
                maps(was, is, &at(name), changes);
                if path.is_empty() && LISTS.contains(&name.as_str()) {
                    moves(name, was, is, changes);
                }
            }
            (Some(was), is) if was == is => {}
            (Some(was), is) => {
                changes.push(Change { path: at(name), kind: Kind::Changed, from: was.clone(), to: is.clone() });
            }
        }
    }
}

/// The fewest steps that must have moved, of those that are in both.
fn moves(path: &str, from: &Map<String, Value>, to: &Map<String, Value>, changes: &mut Vec<Change>) {
    let common = |of: &Map<String, Value>, other: &Map<String, Value>| -> Vec<String> {
        of.keys().filter(|id| other.contains_key(*id)).cloned().collect()
    };
    let (was, is) = (common(from, to), common(to, from));
    let places: Vec<usize> = is.iter().filter_map(|id| was.iter().position(|other| other == id)).collect();
    let stays = longest_rising(&places);
    let before =
        |list: &[String], at: usize| at.checked_sub(1).map_or(Value::Null, |at| Value::from(list[at].as_str()));
    for (at, (id, place)) in is.iter().zip(places).enumerate() {
        if !stays[at] {
            let (from, to) = (before(&was, place), before(&is, at));
            changes.push(Change { path: format!("{path}.{id}"), kind: Kind::Moved, from, to });
        }
    }
}

/// Which numbers belong to the longest rising sequence.
fn longest_rising(numbers: &[usize]) -> Vec<bool> {
    // Of each number, how long a sequence ends with it, and the number before it there.
    let mut ends: Vec<(usize, Option<usize>)> = Vec::with_capacity(numbers.len());
    for (at, number) in numbers.iter().enumerate() {
        let lower = (0..at).filter(|other| numbers[*other] < *number);
        let best = lower.max_by_key(|other| (ends[*other].0, std::cmp::Reverse(*other)));
        ends.push((best.map_or(1, |other| ends[other].0 + 1), best));
    }
    let mut kept = vec![false; numbers.len()];
    let mut next = (0..numbers.len()).max_by_key(|at| (ends[*at].0, std::cmp::Reverse(*at)));
    while let Some(at) = next {
        kept[at] = true;
        next = ends[at].1;
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const BEFORE: &str = "name: x
trigger: {schedule: '@daily'}
inputs: {topic: string}
steps:
  - {id: a, role: w, action: t, timeout: 60s}
  - {id: b, role: w, action: t, params: {n: 1, m: {k: v}}}
  - {id: c, action: transform}
  - {id: d, action: transform}
";

    fn changes(to: &str) -> Vec<(String, Kind)> {
        diff(BEFORE, to).expect("reads").into_iter().map(|change| (change.path, change.kind)).collect()
    }

    #[test]
    fn another_dialect_means_the_same() {
        let same = r#"# A comment.
playbook: x
version: 7
schedule: '@daily'
trigger: scheduled
inputs:
  topic: {type: string}
steps:
  - {tool: t, agent: agent.w, name: a, timeout: 1m}
  - name: b
    with: {m: {k: v}, n: 1}
    tool: t
    agent: w
    approval: none
  - {id: c, tool: transform, retry: }
  - {id: d, action: "transform"}
"#;
        assert_eq!(changes(same), []);
    }

    #[test]
    fn what_differs_is_named_by_its_path() {
        let to = BEFORE
            .replace("timeout: 60s", "timeout: 2m")
            .replace("m: {k: v}", "m: {k: w}")
            .replace("'@daily'", "'@hourly'")
            .replace("  - {id: c, action: transform}\n", "  - {sleep: 1s}\n");
        let found = diff(BEFORE, &to).expect("reads");
        let named: Vec<_> = found.iter().map(|change| (change.path.as_str(), change.kind)).collect();
        assert_eq!(
            named,
            [
                ("trigger.schedule", Kind::Changed),
                ("steps.c", Kind::Removed),
                ("steps.a.timeout", Kind::Changed),
                ("steps.b.params.m.k", Kind::Changed),
                ("steps.sleep", Kind::Added),
            ]
        );
        assert_eq!((&found[2].from, &found[2].to), (&json!("1m"), &json!("2m")));
    }

    #[test]
    fn of_steps_in_another_order_the_fewest_have_moved() {
        let lines: Vec<&str> = BEFORE.lines().collect();
        let of = |order: [usize; 8]| order.iter().map(|at| lines[*at]).collect::<Vec<_>>().join("\n");
        assert_eq!(changes(&of([0, 1, 2, 3, 7, 4, 5, 6])), [("steps.d".to_owned(), Kind::Moved)]);
        assert_eq!(changes(&of([0, 1, 2, 3, 5, 6, 7, 4])), [("steps.a".to_owned(), Kind::Moved)]);
        assert_eq!(changes(&of([0, 1, 2, 3, 7, 6, 5, 4])).len(), 3);
        assert_eq!(changes(BEFORE), []);
    }
}
