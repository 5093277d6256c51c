//! Checks over the whole playbook: references lead somewhere, schedules fire.

use super::step::Read;
use super::{Loader, Use};
use crate::domain::playbook::expr::Reference;
use crate::domain::playbook::model::InputSpec;
use crate::domain::playbook::problem::{Pos, did_you_mean, nearest};

const ROOTS: &[&str] = &["inputs", "steps", "run"];
/// What `run.…` holds.
const RUN_FIELDS: &[&str] = &["id", "playbook", "company_id"];

pub(super) fn references(loader: &mut Loader, steps: &[Read], inputs: &[InputSpec]) {
    let loops: Vec<(usize, usize)> =
        steps.iter().enumerate().filter_map(|(at, read)| read.step.jumps_back_from(at)).collect();
    for Use { step, at, path, reference } in std::mem::take(&mut loader.uses) {
        let before = step.map_or(steps.len(), |index| {
            // Inside a loop, what comes later may have been done the time before.
            let around = loops.iter().filter(|(first, end)| (*first..=*end).contains(&index)).map(|(_, end)| *end);
            around.max().unwrap_or(index)
        });
        check(loader, &reference, at, &path, &steps[..before.min(steps.len())], steps, inputs);
    }
}

fn check(
    loader: &mut Loader,
    reference: &Reference,
    at: Pos,
    path: &str,
    before: &[Read],
    all: &[Read],
    inputs: &[InputSpec],
) {
    let name = reference.name(1).unwrap_or_default();
    match reference.name(0).unwrap_or_default() {
        "inputs" => {
            // Without declared inputs a run may bring any.
            if !inputs.is_empty() && !inputs.iter().any(|input| input.name == name) {
                loader.suggest(
                    at,
                    path,
                    format!("`${{{reference}}}`: there is no input `{name}`"),
                    did_you_mean(name, inputs.iter().map(|input| input.name.as_str())),
                );
            }
        }
        "steps" => {
            if !before.iter().any(|read| read.step.id == name) {
                let ids = before.iter().map(|read| read.step.id.as_str());
                let message = if all.iter().any(|read| read.step.id == name) {
                    format!("`${{{reference}}}`: the step `{name}` does not come before this one")
                } else {
                    format!("`${{{reference}}}`: there is no step `{name}`")
                };
                loader.suggest(at, path, message, did_you_mean(name, ids));
            } else if let Some(field) = reference.name(2)
                // A field of the output may be called so, and be meant.
                && field != "outputs"
                && nearest(field, ["output"]).is_some()
            {
                let tail: String =
                    reference.to_string().split('.').skip(3).map(|segment| format!(".{segment}")).collect();
                loader.suggest(
                    at,
                    path,
                    format!("`${{{reference}}}`: a step shows its `output`"),
                    Some(format!("write `${{steps.{name}.output{tail}}}`")),
                );
            }
        }
        "run" => {
            if !RUN_FIELDS.contains(&name) {
                loader.suggest(
                    at,
                    path,
                    format!("`${{{reference}}}`: a run has no `{name}`"),
                    Some(format!("it has {}", RUN_FIELDS.join(", "))),
                );
            }
        }
        other => loader.suggest(
            at,
            path,
            format!("`${{{reference}}}`: there is no `{other}`"),
            did_you_mean(other, ROOTS.iter().copied()).or_else(|| Some("begin with `inputs` or `steps`".into())),
        ),
    }
}

/// Whether an expression is one that fires. `31 2` reads as a pattern and
/// would only be found out when the first fire is computed.
pub(super) fn cron(expression: &str) -> Result<(), String> {
    let words = expression.split_whitespace().count();
    if !expression.starts_with('@') && words != 5 {
        return Err(format!("`{expression}` is no cron expression: five fields, found {words}"));
    }
    let cron: croner::Cron =
        expression.parse().map_err(|error| format!("`{expression}` is no cron expression: {error}"))?;
    let from = jiff::Timestamp::from_second(1_767_225_600).unwrap_or_default().to_zoned(jiff::tz::TimeZone::UTC);
    cron.find_next_occurrence(&from, false).map(|_| ()).map_err(|_| format!("`{expression}` never fires"))
}
