//! What a company's policy allows, and what it wants a person to say yes to. The one place
//! where that is decided, in the order of the rules (facts 6.1): execution policy, spend caps
//! (`budget`), approvals. A policy stands in `governance`, or in `config.governance`; what
//! either says holds.

use std::time::Duration;

use serde_json::Value;

use super::budget::CREDIT;
use super::duration;
use super::money::Nanos;
use super::playbook::model::{APPROVAL_TIMEOUT, Approval, OnTimeout};
use super::tool::{self, Class, Risk, Tool, same_name};

pub mod check;

/// What an action by an agent is taken to cost where nobody says, in credits: a simple prompt
/// of a middle model (facts 10.1: 3 - 8).
pub const ACTION_CREDITS: i64 = 8;

/// A policy, read.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Policy {
    /// A person has the first word about tasks.
    pub human_in_loop: bool,
    /// A person is asked about everything.
    asks_all: bool,
    /// A person is asked about these actions, tools and classes.
    asks: Vec<String>,
    /// What costs so much or more is asked about, what costs less is not.
    auto_below: Option<Nanos>,
    /// Only these tools.
    allowed: Option<Vec<String>>,
    /// Not these tools.
    blocked: Vec<String>,
    /// Only these hosts.
    hosts: Option<Vec<String>>,
    /// So many agents at work at once.
    pub agents_at_once: Option<i64>,
    /// How long one task may take.
    pub task_max: Option<Duration>,
    /// Who decides.
    reviewers: Vec<String>,
    /// How long they have.
    timeout: Option<Duration>,
    /// When anybody may decide, where nobody has.
    escalation: Option<Duration>,
    /// What is decided at the end of the time.
    on_timeout: Option<OnTimeout>,
}

/// Something that is about to be done.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Action<'a> {
    /// What it is called.
    pub name: &'a str,
    /// The tool that it is, where it is one.
    pub tool: Option<&'static Tool>,
    /// What it is taken to cost.
    pub estimate: Nanos,
}

impl<'a> Action<'a> {
    /// A call of a tool; one that comes from outside, as by MCP, is of the class that reaches
    /// farthest.
    pub fn of_tool(name: &'a str) -> Self {
        let tool = tool::named(name);
        let credits = tool.map_or(ACTION_CREDITS, |tool| tool.credits);
        Self { name, tool, estimate: Nanos(credits * CREDIT) }
    }

    /// What an agent is asked to do.
    pub fn of_agent(name: &'a str, budget: Option<Nanos>) -> Self {
        Self { name, tool: None, estimate: budget.unwrap_or(Nanos(ACTION_CREDITS * CREDIT)) }
    }

    /// How much is at stake.
    pub fn risk(&self) -> Risk {
        let class = self.class().map_or(Risk::Medium, Class::risk);
        if self.estimate.0 >= 50 * CREDIT { Risk::High } else { class }
    }

    fn class(&self) -> Option<Class> {
        // What a server does with a call nobody here knows: it is taken to reach outside.
        self.tool.map(|tool| tool.class).or_else(|| self.name.starts_with("mcp:").then_some(Class::Outbound))
    }

    fn is_named(&self, name: &str) -> bool {
        let of_tool =
            |tool: &Tool| same_name(tool.name, name) || tool.aliases.iter().any(|alias| same_name(alias, name));
        same_name(self.name, name)
            || matches_glob(self.name, name)
            || self.class().is_some_and(|class| class.as_str() == name)
            || self.tool.is_some_and(of_tool)
    }
}

/// `mcp:server/*` takes in all tools of a server.
fn matches_glob(name: &str, pattern: &str) -> bool {
    pattern.strip_suffix('*').is_some_and(|prefix| name.starts_with(prefix))
}

/// What the policy says about an action.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It may be done.
    Allow,
    /// A person is asked first.
    Ask {
        /// By which rule.
        rule: String,
    },
    /// It may not be done.
    Deny {
        /// By which rule.
        rule: String,
    },
}

/// The places where a policy stands.
fn places<'a>(governance: Option<&'a Value>, config: &'a Value) -> Vec<&'a Value> {
    [governance, config.get("governance")].into_iter().flatten().collect()
}

fn names(value: &Value) -> Option<Vec<String>> {
    Some(value.as_array()?.iter().filter_map(|name| Some(name.as_str()?.trim().to_owned())).collect())
}

fn span(value: &Value) -> Option<Duration> {
    duration::parse(value.as_str()?.trim()).ok()
}

impl Policy {
    /// What a company's `governance` and `config` say.
    pub fn of(governance: Option<&Value>, config: &Value) -> Self {
        let mut policy = Self::default();
        for place in places(governance, config) {
            policy.read(place);
        }
        policy
    }

    fn read(&mut self, place: &Value) {
        let mode = place.as_str().or_else(|| place.get("mode")?.as_str());
        self.human_in_loop |= mode == Some("human_in_loop");
        for required in [place.get("approval_required"), place.pointer("/approval/required")].into_iter().flatten() {
            self.asks_all |= required == true;
            self.asks.extend(names(required).unwrap_or_default());
        }
        let credits = place.pointer("/approval/auto_approve_below").and_then(Value::as_f64);
        let below = credits.map(|credits| Nanos((credits.clamp(0.0, 9e9) * CREDIT as f64).round() as i64));
        self.auto_below = self.auto_below.into_iter().chain(below).min();
        let at = |path: &str| place.pointer(&format!("/execution_policy/{path}"));
        if let Some(allowed) = at("allowed_tools").and_then(names) {
            // Both lists hold.
            match &mut self.allowed {
                Some(before) => before.retain(|name| allowed.iter().any(|other| same_name(name, other))),
                none => *none = Some(allowed),
            }
        }
        self.blocked.extend(at("blocked_tools").and_then(names).unwrap_or_default());
        if let Some(hosts) = at("allowed_hosts").and_then(names) {
            match &mut self.hosts {
                Some(before) => before.retain(|name| hosts.contains(name)),
                none => *none = Some(hosts),
            }
        }
        let at_once = at("max_concurrent_agents").and_then(Value::as_i64).filter(|limit| *limit > 0);
        self.agents_at_once = self.agents_at_once.into_iter().chain(at_once).min();
        self.task_max = self.task_max.into_iter().chain(at("max_task_duration").and_then(span)).min();
        let of = |path: &str| place.pointer(&format!("/approval/{path}"));
        self.reviewers.extend(of("reviewers").and_then(names).unwrap_or_default());
        self.timeout = self.timeout.into_iter().chain(of("timeout").and_then(span)).min();
        self.escalation = self.escalation.into_iter().chain(of("escalation_timeout").and_then(span)).min();
        self.on_timeout = self.on_timeout.or(match of("on_timeout").and_then(Value::as_str) {
            Some("approve") => Some(OnTimeout::Approve),
            Some("escalate") => Some(OnTimeout::Escalate),
            Some("reject") => Some(OnTimeout::Reject),
            _ => None,
        });
    }

    /// Whether a tool may be used at all; the rule that forbids it.
    pub fn forbids(&self, action: &Action<'_>) -> Option<String> {
        if self.blocked.iter().any(|name| action.is_named(name)) {
            return Some("governance.execution_policy.blocked_tools".to_owned());
        }
        let own = matches!(action.name, "transform" | "llm.prompt");
        let listed = self.allowed.as_ref().is_none_or(|allowed| allowed.iter().any(|name| action.is_named(name)));
        (!listed && !own).then(|| "governance.execution_policy.allowed_tools".to_owned())
    }

    /// Whether an address may be called; the rule that forbids it.
    pub fn forbids_host(&self, host: &str) -> Option<String> {
        let listed = self.hosts.as_ref().is_none_or(|hosts| Self::lists(hosts, host));
        (!listed).then(|| "governance.execution_policy.allowed_hosts".to_owned())
    }

    /// Whether a host is in a list.
    pub fn lists(hosts: &[String], host: &str) -> bool {
        hosts.iter().any(|pattern| is_host(pattern, host))
    }

    /// Decides about an action.
    pub fn decide(&self, action: &Action<'_>) -> Verdict {
        if action.tool.is_some() || action.name.starts_with("mcp:") {
            if let Some(rule) = self.forbids(action) {
                return Verdict::Deny { rule };
            }
            if self.asks_nobody_about(action) {
                return Verdict::Allow;
            }
        }
        if let Some(name) = self.asks.iter().find(|name| action.is_named(name)) {
            return Verdict::Ask { rule: format!("governance.approval_required: {name}") };
        }
        match self.auto_below {
            Some(below) if action.estimate >= below => {
                Verdict::Ask { rule: "governance.approval.auto_approve_below".to_owned() }
            }
            None if self.asks_all => Verdict::Ask { rule: "governance.approval_required".to_owned() },
            _ => Verdict::Allow,
        }
    }

    /// What only computes, within the run itself.
    fn asks_nobody_about(&self, action: &Action<'_>) -> bool {
        matches!(action.name, "transform" | "llm.prompt") && !self.asks.iter().any(|name| action.is_named(name))
    }

    /// Whether anything is asked about at all.
    pub fn asks(&self) -> bool {
        self.asks_all || !self.asks.is_empty() || self.auto_below.is_some()
    }

    /// How a person is asked.
    pub fn approval(&self, rule: &str) -> Approval {
        Approval {
            reviewers: self.reviewers.clone(),
            timeout: self.timeout.unwrap_or(APPROVAL_TIMEOUT),
            on_timeout: self.on_timeout.unwrap_or(OnTimeout::Reject),
            message: Some(format!("the company's policy asks for a person's word ({rule})")),
        }
    }

    /// When anybody may decide about what is asked, where nobody has.
    pub fn escalates_after(&self) -> Option<Duration> {
        self.escalation
    }

    /// Whether an action has an effect, as far as is known: what an agent does may have one.
    pub fn has_effect(action: &Action<'_>) -> bool {
        action.class().is_none_or(Class::has_effect)
    }
}

/// Whether a host is one that a pattern names: `example.com`, or `*.example.com` for those
/// below it.
fn is_host(pattern: &str, host: &str) -> bool {
    let (pattern, host) = (pattern.to_ascii_lowercase(), host.trim_end_matches('.').to_ascii_lowercase());
    match pattern.strip_prefix("*.") {
        Some(parent) => host.strip_suffix(parent).is_some_and(|below| below.ends_with('.')),
        None => pattern == host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn of(governance: Value) -> Policy {
        Policy::of(Some(&governance), &json!({}))
    }

    fn ask(rule: &str) -> Verdict {
        Verdict::Ask { rule: rule.into() }
    }

    fn deny(rule: &str) -> Verdict {
        Verdict::Deny { rule: format!("governance.execution_policy.{rule}") }
    }

    #[test]
    fn the_execution_policy_comes_first() {
        let policy = of(json!({
            "approval": {"required": true},
            "execution_policy": {"allowed_tools": ["llm.prompt", "file.read", "http_request"], "blocked_tools": ["shell.run", "http.request"]},
        }));
        assert_eq!(policy.decide(&Action::of_tool("http.request")), deny("blocked_tools"));
        assert_eq!(policy.decide(&Action::of_tool("shell.run")), deny("blocked_tools"));
        assert_eq!(policy.decide(&Action::of_tool("file.write")), deny("allowed_tools"));
        assert_eq!(policy.decide(&Action::of_tool("mcp:crm/delete")), deny("allowed_tools"));
        assert_eq!(policy.decide(&Action::of_tool("file_read")), ask("governance.approval_required"));
        assert_eq!(policy.decide(&Action::of_tool("transform")), Verdict::Allow);
        assert_eq!(policy.decide(&Action::of_agent("research", None)), ask("governance.approval_required"));
    }

    #[test]
    fn a_list_names_actions_tools_and_classes() {
        let outbound = of(json!({"execution_policy": {"blocked_tools": ["outbound"]}}));
        assert_eq!(outbound.decide(&Action::of_tool("mcp:crm/delete")), deny("blocked_tools"));
        assert_eq!(Action::of_tool("mcp:crm/delete").risk(), Risk::High);
        let policy = of(json!({"approval_required": ["publish", "outbound-email", "execute", "mcp:crm/*"]}));
        for (action, asked) in [
            (Action::of_agent("publish", None), true),
            (Action::of_agent("outbound_email", None), true),
            (Action::of_agent("research", None), false),
            (Action::of_tool("shell.run"), true),
            (Action::of_tool("file.write"), false),
            (Action::of_tool("mcp:crm/delete"), true),
            (Action::of_tool("mcp:wiki/read"), false),
        ] {
            assert_eq!(matches!(policy.decide(&action), Verdict::Ask { .. }), asked, "{}", action.name);
        }
    }

    #[test]
    fn strictly_below_is_let_through_and_nothing_is_below_zero() {
        let below = |credits: f64| of(json!({"approval": {"required": true, "auto_approve_below": credits}}));
        let action = Action::of_agent("x", Some(Nanos(10 * CREDIT)));
        assert!(matches!(below(10.0).decide(&action), Verdict::Ask { .. }));
        assert_eq!(below(10.01).decide(&action), Verdict::Allow);
        assert!(matches!(below(0.0).decide(&Action::of_tool("file.read")), Verdict::Ask { .. }));
        // What is named is asked about, however little it costs.
        let named = of(json!({"approval": {"required": ["publish"], "auto_approve_below": 1000}}));
        assert!(matches!(named.decide(&Action::of_agent("publish", None)), Verdict::Ask { .. }));
    }

    #[test]
    fn what_either_place_says_holds() {
        let config = json!({"governance": {"execution_policy": {"max_concurrent_agents": 2, "max_task_duration": "30m", "blocked_tools": ["shell.run"]}}});
        let governance = json!({"execution_policy": {"max_concurrent_agents": 4, "allowed_hosts": ["api.example.com", "*.example.org"]}, "approval": {"reviewers": ["founder"], "escalation_timeout": "4h"}});
        let policy = Policy::of(Some(&governance), &config);
        assert_eq!((policy.agents_at_once, policy.task_max), (Some(2), Some(Duration::from_secs(1_800))));
        assert_eq!(policy.decide(&Action::of_tool("shell.run")), deny("blocked_tools"));
        assert_eq!(policy.escalates_after(), Some(Duration::from_secs(4 * 3_600)));
        assert_eq!(policy.approval("x").reviewers, ["founder"]);
        for (host, listed) in [
            ("api.example.com", true),
            ("example.com", false),
            ("a.b.example.org.", true),
            ("example.org", false),
            ("evilexample.org", false),
        ] {
            assert_eq!(policy.forbids_host(host).is_none(), listed, "{host}");
        }
        assert!(Policy::of(Some(&json!("human_in_loop")), &json!({})).human_in_loop);
        assert!(!Policy::of(None, &json!({"governance": "autonomous"})).human_in_loop);
    }

    proptest! {
        // More rules never allow more.
        #[test]
        fn a_stricter_policy_allows_no_more(tool in prop::sample::select(tool::TOOLS.iter().map(|t| t.name).collect::<Vec<_>>()), blocked in prop::sample::select(tool::TOOLS.iter().map(|t| t.name).collect::<Vec<_>>()), all in any::<bool>()) {
            let action = Action::of_tool(tool);
            let before = of(json!({"approval_required": all}));
            let after = of(json!({"approval_required": all, "execution_policy": {"blocked_tools": [blocked]}}));
            let rank = |verdict: Verdict| match verdict { Verdict::Allow => 0, Verdict::Ask { .. } => 1, Verdict::Deny { .. } => 2 };
            prop_assert!(rank(after.decide(&action)) >= rank(before.decide(&action)));
            prop_assert_eq!(matches!(after.decide(&action), Verdict::Deny { .. }), tool == blocked);
        }
    }
}
