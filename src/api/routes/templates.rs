//! What companies can be made from: agents, by the name of a template.

use super::agents::AgentBody;

/// The templates.
pub(super) const NAMES: &[&str] = &["default", "research", "content", "support", "saas-agency"];

/// The agents that a template brings.
pub(super) fn agents(template: &str) -> Option<Vec<AgentBody>> {
    let agents: &[(&str, &str)] = match template {
        "default" => &[STRATEGIST],
        "research" => &[
            (
                "researcher",
                "Research topics, check what you find against a second source, and produce structured reports.",
            ),
            ("analyst", "Analyze what was gathered, say what follows from it, and how sure that is."),
        ],
        "content" => &[
            STRATEGIST,
            ("writer", "Write clear texts for the audience and the tone that the task names."),
            ("editor", "Check texts for errors, tone and facts, and say what to change."),
        ],
        "support" => &[
            ("support", "Answer customers kindly and exactly; hand over to a person what you cannot settle."),
            ("analyst", "Group what customers ask for, and report what should be mended first."),
        ],
        "saas-agency" => &[
            STRATEGIST,
            ("engineer", "Build and mend the product in small steps that are tested."),
            ("marketer", "Write campaigns and copy; publish nothing that was not approved."),
            ("support", "Answer customers kindly and exactly; hand over to a person what you cannot settle."),
        ],
        _ => return None,
    };
    Some(agents.iter().map(|(role, instructions)| AgentBody::brought(role, instructions)).collect())
}

const STRATEGIST: (&str, &str) = (
    "strategist",
    "Plan the company's work: break objectives into tasks, assign them by role, and watch their results.",
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_template_brings_agents_that_are_in_order() {
        for name in NAMES {
            let agents = agents(name).expect("a template");
            assert!(!agents.is_empty());
            for agent in agents {
                assert!(agent.problems_at("", false).is_empty(), "{name}: {}", agent.role);
            }
        }
    }
}
