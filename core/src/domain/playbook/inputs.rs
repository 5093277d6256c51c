//! What a run is started with, checked against what the playbook declares.

use serde_json::{Map, Value};

use super::model::Playbook;
use super::problem::did_you_mean;

/// One wrong parameter: its name and what is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputProblem {
    /// The parameter.
    pub name: String,
    /// A sentence for the caller.
    pub message: String,
}

/// The parameters with defaults filled in, or every problem. A playbook that
/// declares no inputs takes any.
pub fn resolve(playbook: &Playbook, given: Map<String, Value>) -> Result<Map<String, Value>, Vec<InputProblem>> {
    if playbook.inputs.is_empty() {
        return Ok(given);
    }
    let mut problems = Vec::new();
    for (name, value) in &given {
        let problem = match playbook.inputs.iter().find(|input| input.name == *name) {
            None => {
                let near = did_you_mean(name, playbook.inputs.iter().map(|i| i.name.as_str()));
                let hint = near.map(|hint| format!("; {hint}")).unwrap_or_default();
                Some(format!("the playbook has no input `{name}`{hint}"))
            }
            // Null is as good as nothing, where nothing is.
            Some(input) if value.is_null() && !input.required => None,
            Some(input) => input.shape.problem(value),
        };
        problems.extend(problem.map(|message| InputProblem { name: name.clone(), message }));
    }
    let mut resolved = Map::new();
    for input in &playbook.inputs {
        let given =
            given.get(&input.name).filter(|value| !value.is_null() || input.required || input.default.is_none());
        match (given, &input.default) {
            (Some(value), _) | (None, Some(value)) => {
                resolved.insert(input.name.clone(), value.clone());
            }
            (None, None) if input.required => problems.push(InputProblem {
                name: input.name.clone(),
                message: format!("is required, of type {}", input.shape.kind.as_str()),
            }),
            // An optional input that is not given is null, not undefined.
            (None, None) => {
                resolved.insert(input.name.clone(), Value::Null);
            }
        }
    }
    if problems.is_empty() { Ok(resolved) } else { Err(problems) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn resolve_json(given: Value) -> Result<Value, Vec<String>> {
        let playbook = super::super::load("name: x\ninputs:\n  topic: {type: string, required: true}\n  n: {type: integer, default: 3}\n  note: string\nsteps: [{role: a, action: b}]\n").expect("loads");
        let Value::Object(given) = given else { panic!("a map") };
        resolve(&playbook, given)
            .map(Value::Object)
            .map_err(|problems| problems.into_iter().map(|p| format!("{}: {}", p.name, p.message)).collect())
    }

    #[test]
    fn fills_defaults_and_names_every_problem() {
        assert_eq!(resolve_json(json!({"topic": "x"})), Ok(json!({"topic": "x", "n": 3, "note": null})));
        assert_eq!(
            resolve_json(json!({"topik": "x", "n": 1.5})),
            Err(vec![
                "topik: the playbook has no input `topik`; did you mean `topic`?".into(),
                "n: must be of type integer".into(),
                "topic: is required, of type string".into(),
            ])
        );
        let given = json!({"topic": "x", "n": null, "note": null});
        assert_eq!(resolve_json(given), Ok(json!({"topic": "x", "n": 3, "note": null})));
    }
}
