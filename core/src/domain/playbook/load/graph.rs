//! `needs`: steps that form a graph. A step that says nothing needs the one before it.

use super::step::Read;
use super::{Fields, Loader, flow};
use crate::domain::playbook::model::{OnFailure, StepKind};
use crate::domain::playbook::problem::Pos;
use crate::domain::playbook::yaml::Kind;

/// `needs: [a, b]`, or `needs: a`.
pub(super) fn needs(loader: &mut Loader, fields: &Fields<'_>, path: &str) -> Option<Vec<(String, Pos)>> {
    let node = fields.get("needs")?;
    let path = format!("{path}.needs");
    match &node.kind {
        Kind::Seq(items) => Some(items.iter().filter_map(|item| Some((loader.text(item, &path)?, item.at))).collect()),
        Kind::Str(_) | Kind::Int(_) => Some(loader.text(node, &path).map(|name| (name, node.at)).into_iter().collect()),
        _ => {
            let found = node.describe();
            let hint = Some("write `needs: [a, b]`, or `needs: []` for a step that begins at once".to_owned());
            loader.suggest(node.at, &path, format!("expected a list of steps, found {found}"), hint);
            None
        }
    }
}

/// Whether some step says what it needs.
pub(super) fn is_graph(steps: &[Read]) -> bool {
    steps.iter().any(|read| read.flow.needs.is_some())
}

/// Finds the steps that others need, and refuses circles.
pub(super) fn resolve(loader: &mut Loader, steps: &mut [Read]) {
    if !is_graph(steps) {
        return;
    }
    let ids: Vec<String> = steps.iter().map(|read| read.step.id.clone()).collect();
    for (index, read) in steps.iter_mut().enumerate() {
        let path = format!("steps.{index}");
        no_jumps(loader, read, &path);
        read.step.needs = match &read.flow.needs {
            None => index.checked_sub(1).into_iter().collect(),
            Some(names) => {
                let path = format!("{path}.needs");
                let mut needs: Vec<usize> =
                    names.iter().filter_map(|(name, at)| flow::find(loader, &ids, name, *at, &path)).collect();
                needs.sort_unstable();
                needs.dedup();
                needs
            }
        };
    }
    if let Some(circle) = circle(steps) {
        let told: Vec<&str> = circle.iter().chain(&circle[..1]).map(|at| ids[*at].as_str()).collect();
        let first = circle[0];
        let message = format!("the steps wait for each other: {}", told.join(" needs "));
        loader.error(steps[first].at, format!("steps.{first}.needs"), message);
        // What depends on it has no end.
        steps.iter_mut().for_each(|read| read.step.needs.clear());
    }
}

fn no_jumps(loader: &mut Loader, read: &Read, path: &str) {
    if matches!(read.step.kind, StepKind::Goto { .. }) {
        let hint = Some("put the loop into a playbook of its own".to_owned());
        loader.suggest(read.at, &format!("{path}.goto"), "there is no way back where steps have `needs`".into(), hint);
    }
    if matches!(read.step.on_failure, OnFailure::Goto(_)) {
        let hint = Some("write `on_failure: continue`, and `if: steps.ID.error` on what is to follow".to_owned());
        let message = "where steps have `needs`, expected `abort` or `continue`";
        loader.suggest(read.at, &format!("{path}.on_failure"), message.into(), hint);
    }
}

/// Steps that wait for each other, if there are any.
fn circle(steps: &[Read]) -> Option<Vec<usize>> {
    // Whatever has nothing left to wait for is taken away; a circle stays.
    let mut left: Vec<bool> = vec![true; steps.len()];
    loop {
        let free: Vec<usize> =
            (0..steps.len()).filter(|at| left[*at] && steps[*at].step.needs.iter().all(|need| !left[*need])).collect();
        if free.is_empty() {
            break;
        }
        free.into_iter().for_each(|at| left[at] = false);
    }
    let mut way = vec![left.iter().position(|left| *left)?];
    loop {
        let at = *way.last()?;
        let next = *steps[at].step.needs.iter().find(|need| left[**need])?;
        if let Some(began) = way.iter().position(|seen| *seen == next) {
            return Some(way.split_off(began));
        }
        way.push(next);
    }
}

/// For each step those that are over when it begins.
pub(super) fn before(steps: &[Read]) -> Vec<Vec<bool>> {
    let mut before: Vec<Option<Vec<bool>>> = vec![None; steps.len()];
    let mut left = true;
    while std::mem::take(&mut left) {
        for at in 0..steps.len() {
            let needs = &steps[at].step.needs;
            if before[at].is_some() || needs.iter().any(|need| before[*need].is_none()) {
                continue;
            }
            let mut all = vec![false; steps.len()];
            for need in needs {
                all[*need] = true;
                let theirs = before[*need].iter().flatten();
                all.iter_mut().zip(theirs).for_each(|(all, theirs)| *all |= theirs);
            }
            before[at] = Some(all);
            left = true;
        }
    }
    before.into_iter().map(|before| before.unwrap_or_else(|| vec![false; steps.len()])).collect()
}
