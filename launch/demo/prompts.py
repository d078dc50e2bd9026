"""The demo's questions, written by hand for it: short, everyday, answerable in one or two sentences.

Subjects are listed once under the form of question that they belong to; which questions are held out is decided here.
"""

# Every sixth question of the list below is kept for evaluation, so both parts hold every form of question.
HELD_OUT_EVERY = 6

# Form of question -> what is put into it, separated by semicolons.
QUESTIONS = {
    "What is {} used for?": """
        a hammer; a colander; a whisk; a thermometer; a compass; a ladder; a stapler; a corkscrew; a funnel;
        a spirit level; a sieve; a trowel; a wheelbarrow; a microscope; a telescope; a barometer;
        a stethoscope; a sundial; a lighthouse; a rolling pin; a pestle and mortar; a tape measure;
        a paper clip; an umbrella; a life jacket; a tripod; a magnifying glass; a fire extinguisher;
        sandpaper; baking soda; vinegar in cleaning; olive oil; yeast; bubble wrap; a zip; a watering can;
        a rain gauge; a bookmark; an anchor; a thimble; a pulley; a helmet; a glossary; a spreadsheet;
        a calendar; beeswax; cotton; salt in cooking; a greenhouse; a scarecrow; a hearing aid;
        a search engine; a whistle; a hinge; a trailer; an apron; a tea towel; a bird bath; chalk; a torch;
        a padlock; a map legend; an hourglass; a chisel; a measuring cup; a raincoat; an index in a book""",
    "Why {}?": """
        is the sky blue; is the sea salty; do leaves change colour in autumn; does bread rise;
        does ice float on water; do cats purr; do dogs wag their tails; do we yawn; do onions make us cry;
        does metal feel colder than wood; do birds migrate; do bees make honey;
        does the moon seem to change shape; do we have seasons; does popcorn pop; do stars twinkle;
        does iron rust; do we need sleep; is it important to drink water; do apples turn brown;
        do ships float; do mirrors fog up in the bathroom; does a candle need air; do we sneeze;
        do owls hunt at night; do bears hibernate; does thunder follow lightning; do plants need sunlight;
        do cars have seat belts; do we wash our hands before eating; do people wear sunglasses;
        do bicycles have gears; is milk kept cold; do some people keep a diary; do teachers give homework;
        do bats hang upside down; do spiders spin webs; do cyclists wear helmets; do camels have humps;
        do flamingos look pink; do we get goose bumps; does hair turn grey; do batteries run out;
        do people plant trees in cities; do shoes have laces; do we warm up before sport;
        do we put salt on icy roads; do clocks have twelve hours; do cats like boxes; do babies cry;
        does soap clean grease; do trains run on rails; do people recycle paper""",
    "What is the difference between {}?": """
        a frog and a toad; a lake and a pond; weather and climate; a city and a village; tea and coffee;
        jam and jelly; a violin and a guitar; a novel and a short story; a comet and an asteroid;
        a planet and a star; butter and margarine; a fruit and a vegetable; a mammal and a reptile;
        speed and velocity; a hill and a mountain; a road and a street; a lawyer and a judge;
        a crocodile and an alligator; a butterfly and a moth; a hurricane and a tornado; baking and frying;
        rent and a mortgage; a noun and a verb; a simile and a metaphor; mass and weight;
        a square and a rectangle; a virus and a bacterium; a bus and a tram; wool and cotton;
        a river and a stream; a sofa and a chair; an island and a peninsula; a monkey and an ape;
        a biography and an autobiography; an even number and an odd number; a diameter and a radius;
        a solid and a liquid; herbs and spices; a jacket and a coat; a hotel and a hostel;
        a debit card and a credit card; breakfast and brunch; sunrise and sunset; a rabbit and a hare;
        a piano and an organ; hardware and software; a password and a username; an opinion and a fact;
        borrow and lend; a turtle and a tortoise""",
    "How do I {}?": """
        boil an egg; sharpen a pencil; remove a coffee stain; water a cactus; fold a shirt; clean a window;
        ripen a banana; cook rice; make a cup of tea; wrap a present; plant a seed; change a light bulb;
        keep bread fresh; peel garlic; tie a shoelace; iron a shirt; stop hiccups; whistle;
        descale a kettle; set a table; store potatoes; remove a splinter; wash a woollen jumper;
        keep flowers fresh; find north without a compass; start a savings plan; write a thank-you note;
        memorise a poem; calm a nervous dog; fix a squeaky door; choose a ripe melon;
        cut an onion without crying; read a bus timetable; pump up a bicycle tyre; save water at home;
        fall asleep faster; clean muddy boots; keep my desk tidy; make a paper aeroplane;
        take better photos; thread a needle; cool down on a hot day; unblock a sink;
        learn ten new words a day; say no politely; pack a small suitcase;
        catch a spider without hurting it; introduce two friends; make toast without a toaster;
        stay awake in a long meeting; split a bill fairly; prevent blisters on a hike""",
    'What does the word "{}" mean?': """
        reluctant; generous; fragile; ancient; stubborn; curious; abundant; temporary; anonymous; ambitious;
        transparent; nocturnal; edible; inevitable; humble; vivid; obsolete; frugal; hesitate; persuade;
        nostalgia; empathy; dilemma; harvest; drought; souvenir; neighbour; apprentice; compromise;
        hypothesis; irony; patience; gratitude; horizon; echo; bargain; deadline; rumour; melody; avalanche;
        fiction; voluntary; urgent; rural; spontaneous; cautious; gradual; portable; sincere; brittle;
        punctual; scarce; flexible; thrifty; wander; whisper; mend; postpone; fatigue; rehearsal""",
    "What is {}?": """
        photosynthesis; gravity; a haiku; an eclipse; inflation; a fossil; an orchestra; a prime number;
        a vitamin; a volcano; friction; a democracy; evaporation; a rainbow; an ecosystem; a budget;
        a proverb; an allergy; a tide; a recipe; a pension; a synonym; an atom; a glacier; compost;
        a desert; a symphony; a decade; an earthquake; a habit; jet lag; sourdough; a triangle; a time zone;
        a satellite; a passport; a library; a marathon; a solar panel; a skeleton; a coral reef; a font;
        a podcast; a backup copy; a leap year; a monsoon; a warranty; a hobby; a waterfall; a savanna;
        a lullaby; a receipt; an alibi; a census; a dew drop; a food chain; a tongue-twister;
        a bicycle lane; a sonnet""",
    "How does {} work?": """
        a refrigerator; a microwave oven; a bicycle brake; a lock; a candle; a vaccine; a windmill;
        a parachute; a pencil eraser; a vacuum flask; a lift; a traffic light; a hot-air balloon; a toaster;
        a bar code; a smoke alarm; a sponge; a mirror; a digital camera; a water filter; a zip; a submarine;
        a hearing aid; a bank loan; a rain cloud; a kite; a magnet; a ball-point pen; a pressure cooker;
        a library card; a hair dryer; a kettle; a see-saw; a speedometer; an electric car; a recycling bin;
        a water wheel; a scale; a pair of glasses; a rubber band; a lottery; an escalator; a doorbell;
        a heat pump; a pendulum clock; a fishing net; a stapler; a compost heap""",
    "Can {}?": """
        I freeze cooked rice; cats drink milk; penguins fly; plants grow without soil;
        I wash wool in hot water; fish sleep; I eat the skin of a kiwi; dogs see colours; I reuse tea bags;
        people live without sugar; honey go bad; I dry clothes in winter; snakes hear;
        tomatoes grow indoors; I paint over wallpaper; ants swim; I learn the piano as an adult;
        lightning strike the same place twice; I replace butter with oil in a cake;
        owls turn their heads all the way round; I charge my phone overnight; goldfish remember things;
        I recycle glass; you see the moon during the day; I cook pasta in a microwave;
        horses sleep standing up; I keep eggs outside the fridge; cheese float; ducks get wet;
        I bake bread without yeast; parrots understand words; I swim after a meal; bees sting twice;
        a compass point south; I grow herbs on a window sill; crabs walk forwards; rain be salty;
        elephants jump; I read in the dark""",
    "Where {}?": """
        do penguins live; does chocolate come from; should I keep my passport; does rain come from;
        do pandas live; is the Great Barrier Reef; do kangaroos live; does coffee grow; is the Sahara;
        do bees live; does silk come from; should I put a smoke alarm; do eagles nest; does paper come from;
        should I store batteries; is the Eiffel Tower; do salmon lay their eggs; does rubber come from;
        should I place a house plant; do polar bears live; is Mount Fuji; does cinnamon come from;
        do squirrels hide nuts; should I look when I cross the road; does the river Nile end""",
    "When {}?": """
        should I plant tomatoes; do leaves fall; is the best time to visit a museum;
        should I change my toothbrush; do swallows fly south; should I see a dentist;
        is it polite to bring a gift; do tulips bloom; should I water the garden; is an apple ripe;
        do foxes come out; should I defrost the freezer; is it safe to eat mushrooms from the forest;
        do children learn to read; should I use a capital letter; do whales come to the surface;
        should I replace a helmet; is the longest day of the year; should I say thank you in an email;
        does water boil""",
    "What should I {}?": """
        wear to a job interview; eat before a long run; take on a day hike; do if I lose my keys;
        cook for two friends tonight; say to a new colleague; do on a rainy afternoon;
        pack for a weekend by the sea; write in a birthday card; plant in a shady corner;
        do when I feel stressed; keep in a first-aid kit; drink when I have a sore throat;
        do with old newspapers; give a friend who likes books; check before buying a used bicycle;
        do if my phone gets wet; feed a hedgehog; do when the power goes out; learn first in the kitchen;
        bring to a picnic; grow on a balcony; wear in the snow; eat for a light lunch;
        do before a long drive; put in a sandwich; do to remember names; listen to while I study;
        buy for a new flat; draw with a child; do with leftover bread; ask at a flat viewing;
        do if I miss my train; read to a small child""",
}


def all_prompts() -> list[str]:
    """Returns every question, in the order in which they are written above."""
    return [
        form.format(" ".join(subject.split())) for form, listed in QUESTIONS.items() for subject in listed.split(";")
    ]


def split_prompts() -> tuple[list[str], list[str]]:
    """Returns (train questions, held-out questions): disjoint, and the same on every machine."""
    prompts = all_prompts()
    train = [prompt for index, prompt in enumerate(prompts) if index % HELD_OUT_EVERY]
    return train, prompts[::HELD_OUT_EVERY]
