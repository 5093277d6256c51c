//! The tools there are, as policies know them: by what names, of which class, at what cost.
//! What they take and do is the workers' business.

/// What a tool does to the world; a policy may name a class instead of its tools.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Looks at what is the company's own.
    Read,
    /// Changes what is the company's own, and can be undone.
    Write,
    /// Gives others in the company something to do.
    Delegate,
    /// Reaches somebody outside.
    Outbound,
    /// Runs a program.
    Execute,
}

impl Class {
    /// The word in a policy.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Delegate => "delegate",
            Self::Outbound => "outbound",
            Self::Execute => "execute",
        }
    }

    /// How much is at stake.
    pub fn risk(self) -> Risk {
        match self {
            Self::Read => Risk::Low,
            Self::Write | Self::Delegate => Risk::Medium,
            Self::Outbound | Self::Execute => Risk::High,
        }
    }

    /// Whether it leaves something behind that a person may want to know of.
    pub fn has_effect(self) -> bool {
        self != Self::Read
    }
}

/// How much is at stake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Risk {
    /// Little.
    Low,
    /// Something.
    Medium,
    /// Much.
    High,
}

impl Risk {
    /// The word in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
        }
    }
}

/// A tool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tool {
    /// Its name in playbooks and policies.
    pub name: &'static str,
    /// Other names of the same.
    pub aliases: &'static [&'static str],
    /// What it does to the world.
    pub class: Class,
    /// What a call is taken to cost, in credits (facts 10.1: tools 1 - 10, storage 0.1 - 1).
    pub credits: i64,
}

const fn tool(name: &'static str, aliases: &'static [&'static str], class: Class, credits: i64) -> Tool {
    Tool { name, aliases, class, credits }
}

/// All of them.
pub const TOOLS: &[Tool] = &[
    tool("transform", &[], Class::Read, 0),
    tool("llm.prompt", &["llm_prompt"], Class::Read, 8),
    tool("http.request", &["http_request", "fetch"], Class::Outbound, 1),
    tool("web_search", &["web-search", "search_web"], Class::Outbound, 3),
    tool("file.read", &["file_read", "read_file"], Class::Read, 0),
    tool("file.write", &["file_write", "write_file", "write_code"], Class::Write, 1),
    tool("code.execute", &["code_execute"], Class::Execute, 5),
    tool("shell.run", &["shell_run", "run_command"], Class::Execute, 5),
    tool("memory.read", &["memory_read"], Class::Read, 0),
    tool("memory.search", &["memory_search"], Class::Read, 0),
    tool("memory.write", &["memory_write"], Class::Write, 1),
    tool("create_task", &["create-task"], Class::Delegate, 1),
    tool("list_tasks", &[], Class::Read, 0),
    tool("send_message", &["send-message"], Class::Delegate, 1),
    tool("run_playbook", &["run-playbook"], Class::Delegate, 1),
    tool("evaluate", &[], Class::Read, 3),
];

/// The tool of a name, whichever of its names that is.
pub fn named(name: &str) -> Option<&'static Tool> {
    TOOLS.iter().find(|tool| tool.name == name || tool.aliases.contains(&name))
}

/// Whether two names mean the same: `outbound-email` and `outbound_email` do.
pub fn same_name(one: &str, other: &str) -> bool {
    fn letters(name: &str) -> impl Iterator<Item = char> {
        name.chars().filter(|c| !matches!(c, '-' | '_' | '.' | ' ' | '/')).flat_map(char::to_lowercase)
    }
    letters(one).eq(letters(other))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_is_of_one_tool() {
        let names: Vec<&str> =
            TOOLS.iter().flat_map(|tool| tool.aliases.iter().chain(std::iter::once(&tool.name))).copied().collect();
        for name in &names {
            assert_eq!(names.iter().filter(|other| *other == name).count(), 1, "{name}");
        }
        assert_eq!(named("file_read").map(|tool| tool.name), Some("file.read"));
        assert!(same_name("outbound-email", "Outbound_Email") && !same_name("publish", "publisher"));
    }
}
